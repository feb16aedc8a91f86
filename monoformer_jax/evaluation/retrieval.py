"""The judge of drawings of captions: which picture of the set is nearest to a drawing, in pixel space?

The nearest is sought among all pictures of the set, trained or held out. A figure means something
beside its baselines (`baselines`): a copy of the picture of the nearest training caption is often among
the five nearest to the truth, and never the nearest.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from monoformer_jax.evaluation.frechet import frechet_distance

NOISE = 0.25  # standard deviation of the noise of a baseline, in the range [-1, 1]


@dataclasses.dataclass(frozen=True)
class CaptionedSet:
    """Pictures with their captions, of which some were trained.

    Attributes:
      pictures: float [n, height, width, C] in [-1, 1].
      names: captions of each picture.
      labels: (base, attributes) of each caption.
      trained: bool [n], whether a picture was trained; the others are held out.
    """

    pictures: np.ndarray
    names: Sequence[tuple[str, ...]]
    labels: Sequence[tuple[tuple[Hashable, Hashable], ...]]
    trained: np.ndarray


def judge(known: CaptionedSet, drawn: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores drawings [m, height, width, C] of the captions of pictures truth [m].

    top1, top5: share of drawings to which fewer than one, and than five, pictures are nearer than the
      true one.
    both_right, base_right, attribute_right: share whose nearest picture has a label of the true one,
      a base of it, attributes of it.
    memorised_share: share that is nearer to a trained picture than to the true one.
    pixel_error: mean absolute difference from the true picture.
    frechet, frechet_train: Fréchet distance in pixel space to the true, and to the trained pictures.
    """
    drawn = np.clip(drawn, -1, 1)
    far = squared_distances(drawn, known.pictures)
    own = far[np.arange(len(truth)), truth][:, None]
    before, nearest = (far < own).sum(1), far.argmin(1)
    pixels, true = _flat(known.pictures), known.pictures[truth]
    return {
        "top1": float((before < 1).mean()),
        "top5": float((before < 5).mean()),
        **_right(known, nearest, truth),
        "memorised_share": float((far[:, known.trained] < own).any(1).mean()),
        "pixel_error": float(np.abs(drawn - true).mean()),
        "frechet": frechet_distance(_flat(drawn), _flat(true)),
        "frechet_train": frechet_distance(_flat(drawn), pixels[known.trained]),
    }


def nearness(drawn: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """top1, top5 and pixel_error of `judge`, of drawings [m, …] among their true pictures [m, …]."""
    far = squared_distances(drawn, true)
    before = (far < np.diag(far)[:, None]).sum(1)
    found = {"top1": before < 1, "top5": before < 5, "pixel_error": np.abs(drawn - true)}
    return {name: float(values.mean()) for name, values in found.items()}


def judge_names(known: CaptionedSet, answers: Sequence[str], shown: np.ndarray) -> dict[str, float]:
    """Scores answers to the question which pictures shown [m] are.

    names_exact: share of answers that are a name of the picture.
    names_base, names_attribute: share that are the name of some picture of the set with a base, and
      with attributes, of the shown one; names_by_parts: their mean.
    """
    of_name = {name: i for i, names in enumerate(known.names) for name in names}
    exact = [answer in known.names[i] for answer, i in zip(answers, shown, strict=True)]
    found = np.array([of_name.get(answer, -1) for answer in answers])
    parts = _right(known, found, shown)
    return {
        "names_exact": float(np.mean(exact)),
        "names_base": parts["base_right"],
        "names_attribute": parts["attribute_right"],
        "names_by_parts": (parts["base_right"] + parts["attribute_right"]) / 2,
    }


def baselines(known: CaptionedSet, truth: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Drawings [m, height, width, C] that need no model, of the captions of pictures truth [m].

    nearest_train: the trained picture with the nearest caption, see `nearest_caption`.
    random: a picture of the set.
    mean: the mean of the trained pictures.
    noisy_truth: the true picture with normal noise of standard deviation `NOISE`.
    """
    rng = np.random.default_rng(seed)
    trained = np.flatnonzero(known.trained)
    owners = [i for i in trained for _ in known.names[i]]
    captions = [name for i in trained for name in known.names[i]]
    nearest = nearest_caption([known.names[i][0] for i in truth], captions)
    true = known.pictures[truth]
    return {
        "nearest_train": known.pictures[np.array(owners)[nearest]],
        "random": known.pictures[rng.integers(len(known.pictures), size=len(truth))],
        "mean": np.broadcast_to(known.pictures[trained].mean(0), true.shape),
        "noisy_truth": true + NOISE * rng.normal(size=true.shape),
    }


def naming_baselines(known: CaptionedSet, shown: np.ndarray, seed: int = 0) -> dict[str, list[str]]:
    """Answers that need no model: the name of the nearest trained picture, and that of any picture."""
    trained = np.flatnonzero(known.trained)
    nearest = trained[squared_distances(known.pictures[shown], known.pictures[trained]).argmin(1)]
    any_of = np.random.default_rng(seed).integers(len(known.names), size=len(shown))
    return {
        "nearest_train": [known.names[i][0] for i in nearest],
        "random": [known.names[i][0] for i in any_of],
    }


def nearest_caption(queries: Sequence[str], captions: Sequence[str]) -> np.ndarray:
    """Index of the caption with the largest TF-IDF cosine to each query; the first of equal ones."""
    words = [[word.strip(",.:") for word in text.split()] for text in (*captions, *queries)]
    columns = {word: i for i, word in enumerate(dict.fromkeys(w for text in words for w in text))}
    counts = np.zeros((len(words), len(columns)))
    for row, text in zip(counts, words):
        for word, count in collections.Counter(text).items():
            row[columns[word]] = count
    texts = len(captions)
    rarity = np.log((1 + texts) / (1 + (counts[:texts] > 0).sum(0))) + 1
    vectors = counts * rarity
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Rounded: the order of sums must not decide between equal ones.
    return (vectors[texts:] @ vectors[:texts].T).round(9).argmax(1)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [m, n] of pictures a [m, …] and b [n, …]."""
    a, b = _flat(a), _flat(b)
    return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).round(9)


def _right(known: CaptionedSet, found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Shares of found pictures [m] with labels of the true ones [m]; -1: none was found."""
    both, base, attribute = [], [], []
    for one, own in zip(found, truth, strict=True):
        theirs, ours = known.labels[one] if one >= 0 else (), known.labels[own]
        both.append(bool(set(theirs) & set(ours)))
        base.append(bool({x[0] for x in theirs} & {x[0] for x in ours}))
        attribute.append(bool({x[1] for x in theirs} & {x[1] for x in ours}))
    shares = {"both_right": both, "base_right": base, "attribute_right": attribute}
    return {name: float(np.mean(values)) for name, values in shares.items()}


def _flat(pictures: np.ndarray) -> np.ndarray:
    return np.asarray(pictures, np.float64).reshape(len(pictures), -1)
