"""Distances between sets of feature vectors: Fréchet, kernel, precision, recall; Inception Score.

    frechet_distance   means and covariances: of vectors, or of `Statistics` gathered batch by batch
    kernel_distance    unbiased polynomial MMD (KID), which has no bias from the number of vectors
    precision_recall   share of one set within the nearest neighbours of the other
    InceptionScore     of class logits, batch by batch

The functions know no extractor: with Inception features they are FID, KID and so on, else not.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.errors import require

NEIGHBOURS = 3  # Kynkäänniemi et al. (1904.06991), and ADM
_BLOCK = 4000  # vectors of each set whose distances are computed at once: 64 MB
_PART = 1000  # vectors that are added to a covariance at once
_SPLIT = 5000  # images of a part of the Inception Score, as ADM's evaluator
_SUBSETS, _SUBSET = 100, 1000  # of the kernel distance, as torch-fidelity
_SEED = 2020  # of its subsets
# Relative errors of eigenvalues: more is a damaged file, or a LAPACK that computes wrong values.
_NEGATIVE, _WRONG = 1e-5, 1e-6


class Statistics(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class RunningStatistics:
    """Mean and covariance of vectors that come in batches; it holds d² float64 numbers.

    The scatter around the mean is merged part by part (Chan et al. 1983): a sum of squares would lose
    digits of a covariance that is small beside the mean.
    """

    def __init__(self, dim: int):
        self._count, self._waiting = 0, []
        self._mean, self._scatter = np.zeros(dim), np.zeros((dim, dim))

    def update(self, vectors: np.ndarray) -> None:
        """Adds vectors [n, d]; raises InputError if a value is not finite."""
        self._waiting.append(_finite(vectors))
        if sum(map(len, self._waiting)) >= _PART:  # each part walks through the scatter
            self._merge()

    def _merge(self) -> None:
        x, self._waiting = np.concatenate(self._waiting), []
        total, mean = self._count + len(x), x.mean(0)
        shift = mean - self._mean
        x -= mean
        self._scatter += x.T @ x
        self._scatter += np.outer(shift * (self._count * len(x) / total), shift)
        self._mean += shift * (len(x) / total)
        self._count = total

    def result(self) -> Statistics:
        if self._waiting:
            self._merge()
        require(self._count > 1, "a covariance needs at least two feature vectors")
        return Statistics(self._mean, self._scatter / (self._count - 1))


def frechet_distance(a: np.ndarray | Statistics, b: np.ndarray | Statistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of two sets of vectors (Heusel et al., 1706.08500).

    The trace of the square root is the sum of the square roots of the eigenvalues of Σa^½ Σb Σa^½,
    which is symmetric: this avoids complex values and a failing matrix square root. With Σa = AᵀA and
    Σb = BᵀB it is also the sum of the singular values of ABᵀ, which is small for few vectors.

    Args:
      a, b: vectors [n, d], or their statistics.

    Raises:
      InputError: fewer than two vectors, values that are not finite, other dimensions, or a covariance
        with a negative eigenvalue.
      ArithmeticError: the eigenvalues do not have the sum tr(Σa Σb): this numpy computes wrong ones.
    """
    a, b = (x if isinstance(x, Statistics) else _finite(x) for x in (a, b))
    for x in (a, b):
        require(
            isinstance(x, Statistics) or len(x) > 1,
            "the Fréchet distance needs at least two feature vectors of each set",
        )
    dims = [(x.mean if isinstance(x, Statistics) else x).shape[-1] for x in (a, b)]
    require(dims[0] == dims[1], f"the features have {dims[0]} and {dims[1]} values")
    if not any(isinstance(x, Statistics) for x in (a, b)) and dims[0] > min(len(a), len(b)):
        mean = a.mean(0) - b.mean(0)
        a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        return float(mean @ mean + np.square(a).sum() + np.square(b).sum() - 2 * root)
    (mean_a, cov_a), (mean_b, cov_b) = map(_statistics, (a, b))
    mean = mean_a - mean_b
    spread = np.trace(cov_a) + np.trace(cov_b)
    return float(mean @ mean + spread - 2 * _trace_of_root(cov_a, cov_b))


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """tr (ab)^½ of two covariances."""
    values, vectors = np.linalg.eigh(a)
    half = vectors * np.sqrt(_not_negative(values))
    between = np.linalg.eigvalsh(half.T @ b @ half)
    want = np.vdot(a, b)  # computed without eigenvalues
    if abs(between.sum() - want) > _WRONG * abs(want):
        raise ArithmeticError(
            f"the eigenvalues of a product of covariances have the sum {between.sum():.9g}, not "
            f"{want:.9g}: the linear algebra library of numpy computes wrong values on this processor"
        )
    return np.sqrt(_not_negative(between)).sum()


def _not_negative(values: np.ndarray) -> np.ndarray:
    """Eigenvalues [d] in ascending order of a matrix that has none below 0 but for rounding."""
    require(
        values[0] >= -_NEGATIVE * max(values[-1], np.finfo(float).tiny),
        f"a covariance has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}: these are not the "
        "statistics of features",
    )
    return np.clip(values, 0, None)


def _statistics(x: np.ndarray | Statistics) -> Statistics:
    if isinstance(x, Statistics):
        require(all(np.isfinite(part).all() for part in x), "statistics are not finite")
        return x
    return Statistics(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def _finite(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, d] as float64."""
    x = np.asarray(vectors, np.float64)
    require(x.ndim == 2 and len(x) > 0, f"features have the shape {x.shape}, not [n, d]")
    require(
        bool(np.isfinite(x).all()), "features have values that are not finite (NaN or infinity)"
    )
    return x


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = _SUBSETS, size: int = _SUBSET
) -> tuple[float, float]:
    """Unbiased MMD² with the kernel (x·y / d + 1)³ (KID, Bińkowski et al., 1801.01401), [n, d] each.

    Returns:
      Mean and standard deviation over random subsets of `size` vectors, or as many as there are; the
      subsets are those of torch-fidelity.
    """
    size = min(size, len(a), len(b))
    require(size > 1, "a kernel distance needs at least two vectors of each set")
    rng, found = np.random.RandomState(_SEED), np.zeros(subsets)
    for number in range(subsets):
        x, y = (z[rng.choice(len(z), size, replace=False)] for z in (a, b))
        own = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y)))
        found[number] = own / (size * (size - 1)) - 2 * _kernel(x, y).mean()
    return float(found.mean()), float(found.std())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = np.asarray(x @ y.T, np.float64) / x.shape[1] + 1
    return k * k * k  # np.power takes ten times as long


def precision_recall(
    generated: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS, block: int = _BLOCK
) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al., 1904.06991) of vectors [n, d] and [m, d].

    Precision is the share of generated vectors that are as near to a real one as its k-th nearest real
    neighbour is, recall the share of real vectors of which that holds with the sets exchanged.
    Distances are computed by blocks on the default device, in float32.
    """
    for x in (generated, real):
        require(
            len(x) > neighbours,
            f"precision and recall need more than {neighbours} vectors of each set, not {len(x)}",
        )
    center = real.mean(0, dtype=np.float64).astype(np.float32)  # smaller values lose fewer digits
    blocks = [[x[i : i + block] for i in range(0, len(x), block)] for x in (generated, real)]
    radii = [[_radii(center, x, parts, neighbours) for x in parts] for parts in blocks]
    inside = [[np.zeros(len(x), bool) for x in parts] for parts in blocks]
    for i, x in enumerate(blocks[0]):
        for j, y in enumerate(blocks[1]):
            near_real, near_generated = _within(center, x, y, radii[0][i], radii[1][j])
            inside[0][i] |= np.asarray(near_real)
            inside[1][j] |= np.asarray(near_generated)
    precision, recall = (float(np.concatenate(parts).mean()) for parts in inside)
    return precision, recall


def _radii(
    center: np.ndarray, x: np.ndarray, parts: list[np.ndarray], neighbours: int
) -> np.ndarray:
    """Squared distance of each vector [n] to its k-th nearest other one in its own set."""
    nearest = np.zeros((len(x), 0), np.float32)
    for part in parts:  # one by one: blocks that wait on the device would fill its memory
        nearest = np.asarray(
            _nearest(center, nearest, x, part, neighbours + 1)
        )  # itself is the nearest
    return nearest[:, -1]


@functools.partial(jax.jit, static_argnums=4)
def _nearest(
    center: jax.Array, nearest: jax.Array, x: jax.Array, y: jax.Array, count: int
) -> jax.Array:
    """The smallest distances so far, with those of x to y."""
    distances = jnp.concatenate([nearest, _squared_distances(center, x, y)], 1)
    return -jax.lax.top_k(-distances, min(count, distances.shape[1]))[0]


@jax.jit
def _within(
    center: jax.Array, x: jax.Array, y: jax.Array, of_x: jax.Array, of_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether each x is within the radius of some y, and each y within that of some x."""
    distances = _squared_distances(center, x, y)
    return (distances <= of_y).any(1), (distances <= of_x[:, None]).any(0)


def _squared_distances(center: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """[d], [n, d], [m, d] -> float32 [n, m]."""
    x, y = x.astype(jnp.float32) - center, y.astype(jnp.float32) - center
    # Norms as a product of matrices: XLA on CPUs would compute a sum anew for every pair.
    ones = jnp.ones((x.shape[1], 8))
    with jax.default_matmul_precision("highest"):
        norm_x, norm_y, products = ((x * x) @ ones)[:, 0], ((y * y) @ ones)[:, 0], x @ y.T
    return jnp.maximum(norm_x[:, None] - 2 * products + norm_y, 0)


class InceptionScore:
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al., 1606.03498).

    Args:
      split: images of a part; the score is the mean over the parts, as in ADM's evaluator, which takes
        5,000 in the order of the file.
    """

    def __init__(self, split: int = _SPLIT):
        self._split, self._scores = split, []
        self._count, self._entropy, self._classes = 0, 0.0, 0.0

    def update(self, logits: np.ndarray) -> None:
        """Adds the class logits [n, classes] of images."""
        for start in range(0, len(logits), self._split):
            self._update(_finite(logits[start : start + self._split]))

    def _update(self, logits: np.ndarray) -> None:
        room = self._split - self._count
        x = logits[:room] - logits[:room].max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        self._entropy += (p * log_p).sum()
        self._classes = self._classes + p.sum(0)
        self._count += len(x)
        if self._count == self._split:
            self._close()
        if len(logits) > room:
            self._update(logits[room:])

    def _close(self) -> None:
        share = self._classes / self._count
        known = share[share > 0]
        self._scores.append(np.exp(self._entropy / self._count - known @ np.log(known)))
        self._count, self._entropy, self._classes = 0, 0.0, 0.0

    def result(self) -> float:
        """The mean over the parts, of which the last may be smaller."""
        if self._count:
            self._close()
        require(bool(self._scores), "an Inception Score needs images")
        return float(np.mean(self._scores))
