"""Figures of a set of pictures beside a reference, from Inception features or from pixels.

    with Inception weights   FID, sFID, KID, precision, recall, Inception Score
    without                  the Fréchet and the kernel distance, precision and recall of the pixels of
                             small pictures: figures of another name, which compare with no FID

Sets are read once, in batches: statistics need no list of features; KID, precision and recall do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.data.image_io import crop, from_uint8
from monoformer_jax.errors import InputError, require
from monoformer_jax.evaluation.frechet import (
    NEIGHBOURS,
    InceptionScore,
    RunningStatistics,
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from monoformer_jax.evaluation.image_set import ImageSet, open_image_set
from monoformer_jax.evaluation.inception import RESIZES, Inception
from monoformer_jax.files import atomic_write

PIXELS = 16  # side of the pictures whose pixels are compared, unless it is given
_HASH = 16  # hexadecimal digits


class Pixels:
    """The pixels of pictures, center-cropped and resized to a side, in [-1, 1]."""

    batch = 256

    def __init__(self, side: int):
        self.side, self.name = side, f"pixels {side}x{side}x3"
        self.dims = {"pool": 3 * side**2}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, h, w, 3] to "pool" [n, side · side · 3], as features are called here."""
        small = [crop(PIL.Image.fromarray(image), self.side) for image in images]
        return {"pool": from_uint8(np.stack(small)).reshape(len(images), -1)}


@dataclasses.dataclass(frozen=True)
class Features:
    """What is known of a set.

    Attributes:
      statistics: of the features "pool" and, of Inception, "spatial".
      digest: start of the SHA-256 of the pixels, or of the statistics where these were given.
      count: number of pictures behind the statistics; 0 if unknown.
      vectors: float32 [n, d], the features "pool" of all pictures; None if only statistics are known.
      inception_score: None without class logits.
    """

    statistics: dict[str, Statistics]
    digest: str
    count: int
    vectors: np.ndarray | None
    inception_score: float | None


def extract(images: ImageSet, extractor: Pixels | Inception, what: str) -> Features:
    """Reads a set; statistics of a file take the place of those of its pictures.

    Args:
      what: name of the set in the progress bar.

    Raises:
      InputError: pictures that cannot be read or differ in size, or features that are not finite.
    """
    given = _given_statistics(images, extractor)
    running: dict[str, RunningStatistics] = {}
    score, digest, vectors, read = None, hashlib.sha256(), None, 0
    for batch in _batches(images, extractor, what):
        digest.update(batch)
        found = extractor(batch)
        if vectors is None:
            vectors = np.empty((images.count, found["pool"].shape[1]), np.float32)
        vectors[read : read + len(batch)] = found["pool"]
        read += len(batch)
        if "logits" in found:
            score = score or InceptionScore()
            score.update(found["logits"])
        for name in ("pool", "spatial"):
            if name in found and name not in given:
                running.setdefault(name, RunningStatistics(found[name].shape[1]))
                running[name].update(found[name])
    for name, part in given.items():
        digest = digest if name == "spatial" else hashlib.sha256()
        digest.update(part.mean.tobytes() + part.covariance.tobytes())
    return Features(
        given or {name: part.result() for name, part in running.items()},
        digest.hexdigest()[:_HASH],
        images.count if images.has_images and not given else images.statistics.get("count", 0),
        vectors,
        None if score is None else score.result(),
    )


def _batches(images: ImageSet, extractor: Pixels | Inception, what: str):
    from tqdm import tqdm

    if images.has_images:
        with tqdm(total=images.count, desc=what, unit="picture", disable=None) as bar:
            for batch in images.batches(extractor.batch):
                yield batch
                bar.update(len(batch))


def _given_statistics(images: ImageSet, extractor: Pixels | Inception) -> dict[str, Statistics]:
    """The statistics of a file, if they are of this extractor.

    Raises:
      InputError: there are no pictures, and the statistics are those of another extractor.
    """
    found, source = images.statistics, images.source
    if not found or (isinstance(extractor, Pixels) and images.has_images):
        return {}
    theirs = found.get("extractor")
    require(
        theirs in (None, extractor.name),
        f"{source} has statistics of the extractor {theirs!r}, not of {extractor.name!r}: scores of "
        "two extractors do not compare",
    )
    require(
        theirs is not None or isinstance(extractor, Inception),
        f"{source} has statistics of Inception features and no pictures: give the weights with "
        "--inception=FILE",
    )
    if theirs is None and isinstance(extractor, Inception):
        require(
            "mu_s" not in found or extractor.resize == "adm",
            f"{source} has statistics of ADM's evaluator: leave out --resize={extractor.resize}",
        )
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    given = {
        name: Statistics(*(np.asarray(found[key], np.float64) for key in keys))
        for name, keys in names.items()
        if set(keys) <= found.keys() and name in extractor.dims
    }
    for name, part in given.items():
        dim = extractor.dims[name]
        require(
            part.mean.shape == (dim,) and part.covariance.shape == (dim, dim),
            f"{source} has a mean {list(part.mean.shape)} and a covariance "
            f"{list(part.covariance.shape)}, not of the {dim} features of {extractor.name}",
        )
    return given


def check_sizes(images: ImageSet, reference: ImageSet) -> None:
    """Raises InputError if two sets have pictures of different sizes, where both are known."""
    sizes = [(x.height, x.width) for x in (images, reference)]
    require(
        sizes[0] == sizes[1] or (0, 0) in sizes,
        f"{images.source} has pictures of {sizes[0][1]}×{sizes[0][0]} pixels and {reference.source} of "
        f"{sizes[1][1]}×{sizes[1][0]}: scores of two resolutions do not compare, resize one of them",
    )


def compare(generated: Features, reference: Features | None) -> dict[str, float]:
    """The figures of a set; those that need more than the reference has are absent.

    frechet: Fréchet distance of the features "pool": FID if they are Inception's.
    sfid: that of the spatial features.
    kid, kid_subset_std: `kernel_distance`. precision, recall: `precision_recall`. inception_score.
    """
    scores = {}
    if generated.inception_score is not None:
        scores["inception_score"] = generated.inception_score
    if reference is None:
        return scores
    for name, of_reference in reference.statistics.items():
        if (part := generated.statistics.get(name)) is not None:
            key = {"pool": "frechet", "spatial": "sfid"}[name]
            scores[key] = frechet_distance(part, of_reference)
    if reference.vectors is not None and generated.vectors is not None:
        pair = kernel_distance(generated.vectors, reference.vectors)
        scores["kid"], scores["kid_subset_std"] = pair
        if min(len(generated.vectors), len(reference.vectors)) > NEIGHBOURS:
            pair = precision_recall(generated.vectors, reference.vectors)
            scores["precision"], scores["recall"] = pair
    return scores


def open_extractor(
    images: ImageSet, weights: epath.Path | None, resize: str, pixels: int | None
) -> Pixels | Inception:
    """The extractor that flags ask for.

    Args:
      weights: file of Inception weights; None: pixels.
      pixels: side of the pictures whose pixels are compared; None: `PIXELS`, or less for smaller ones.

    Raises:
      InputError: flags that exclude each other, or pictures smaller than `pixels`.
    """
    if weights is not None:
        require(pixels is None, "--inception and --pixels exclude each other")
        return Inception(Path(weights), resize)
    require(resize == RESIZES[0], f"--resize={resize} is of Inception: give --inception=FILE")
    side = min(images.height, images.width)
    require(
        pixels is None or pixels <= side,
        f"--pixels={pixels} is more than the {images.width}×{images.height} of {images.source}",
    )
    return Pixels(pixels or min(PIXELS, side))


def cautions(generated: Features, reference: Features) -> list[str]:
    """Sentences on figures that mean less than they seem to."""
    said = []
    dim = len(generated.statistics["pool"].mean)
    for name, part in (("generated", generated), ("reference", reference)):
        if 0 < part.count <= dim:
            said.append(
                f"{part.count:,} {name} pictures are fewer than the {dim + 1:,} that a full-rank "
                f"covariance of {dim:,} features needs: the Fréchet distance is too large, and "
                "compares only with that of as many pictures"
            )
    if reference.vectors is None:
        said.append("the reference has no pictures: KID, precision and recall are not measured")
    return said


def are_our_statistics(path: epath.Path) -> bool:
    """Whether `write_statistics` wrote a file."""
    try:
        return "extractor" in open_image_set(path).statistics
    except InputError:
        return False


def write_statistics(
    path: epath.Path, features: Features, images: ImageSet, extractor: Pixels | Inception
) -> None:
    """Writes statistics in ADM's format, with the extractor, count and size that they are of."""
    arrays: dict[str, Any] = {"extractor": extractor.name, "count": features.count}
    arrays |= {"height": images.height, "width": images.width}
    for name, end in (("pool", ""), ("spatial", "_s")):
        if name in features.statistics:
            part = features.statistics[name]
            arrays |= {f"mu{end}": part.mean, f"sigma{end}": part.covariance}
    with atomic_write(path) as staging, staging.open("wb") as file:
        np.savez(file, **arrays)
