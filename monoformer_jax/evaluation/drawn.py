"""Drawings of held-out prompts beside the held-out pictures: of any run that generates images."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from monoformer_jax.data.documents import Part
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import features
from monoformer_jax.evaluation.clip_score import ClipScore
from monoformer_jax.evaluation.image_set import in_memory
from monoformer_jax.evaluation.inception import Inception
from monoformer_jax.evaluation.record import with_spread
from monoformer_jax.evaluation.retrieval import nearness
from monoformer_jax.evaluation.samples import caption, drawing, in_turn
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.outputs import to_rgb

_BATCH = 64


def evaluate(
    model,
    examples: Mapping[str, Sequence[Sequence[Part]]],
    most: int,
    seeds: int,
    open_extractor: Callable[..., features.Pixels | Inception],
    log: Callable[[str], None],
    clip: ClipScore | None = None,
) -> tuple[dict[str, float], dict]:
    """Draws the prompts of held-out examples, and compares with the held-out pictures.

    Args:
      model: a `monoformer_jax.Model`.
      examples: held-out examples of each source, see `data.held_out.HeldOut`.
      most: prompts that are drawn, at most.
      seeds: number of seeds; the figures are their means, with KEY_spread.
      open_extractor: an `ImageSet` -> the extractor.
      log: is told what is not measured, and why.
      clip: measures the drawings and the words of their prompts, as clip_score.

    Returns:
      heldout_*: `features.compare`; top1, top5 and pixel_error of `retrieval.nearness` among these
      pictures. And the provenance: extractor, count, and hash of the held-out pictures.
    """
    found = [x for x in map(drawing, in_turn(examples.values())) if x is not None]
    sizes = collections.Counter(x.target.shape for x in found)
    if len(sizes) > 1:
        log(f"pictures of {len(sizes)} sizes are held out: the most frequent one is drawn")
    chosen = [x for x in found if x.target.shape == sizes.most_common(1)[0][0]][:most]
    try:
        if len(chosen) < 2:
            raise InputError("fewer than two held-out examples have a prompt and a picture to draw")
        model.image_processor.codec.check()
    except InputError as error:
        log(f"drawings are not measured: {error}")
        return {}, {}
    true = to_rgb(model.image_processor.decode(np.stack([x.target for x in chosen])))
    reference = in_memory(true, "the held-out pictures")
    extractor = open_extractor(reference)
    against = features.extract(reference, extractor, "held-out pictures")
    scores = []
    for seed in range(seeds):
        log(f"drawing {len(chosen)} held-out prompts")
        drawn = _draw(model, [x.prompt for x in chosen], true.shape[1:3], seed)
        measured = features.extract(in_memory(drawn, "the drawings"), extractor, "drawings")
        scores.append(features.compare(measured, against) | nearness(drawn / 127.5, true / 127.5))
        if clip is not None:
            words = [caption(x.prompt) for x in chosen]
            scores[-1]["clip_score"] = clip.score(in_memory(drawn, "the drawings"), words)
    for sentence in features.cautions(measured, against):
        log(f"note: {sentence}")
    provenance = {"extractor": extractor.name, "count": len(chosen)}
    provenance["reference_sha256"] = against.digest
    if clip is not None:
        provenance |= {"clip": clip.name, "prompts_cut": clip.cut}
    return {f"heldout_{key}": value for key, value in with_spread(scores).items()}, provenance


def _draw(model, prompts: list, size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [n, height, width, 3]."""
    factor = model.image_processor.codec.factor
    size = (size[0] // factor, size[1] // factor)
    parts = [
        model.image_processor.decode(
            generate_images(model, prompts[i : i + _BATCH], size=size, seed=seed, first=i)
        )
        for i in range(0, len(prompts), _BATCH)
    ]
    return to_rgb(np.concatenate(parts))
