"""Fréchet distance between two sets of feature vectors."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of two sets of vectors, each [n, d] (Heusel et al. 2017).

    The trace of the square root is computed as the sum of the square roots of the eigenvalues of
    Σa^½ Σb Σa^½, which is symmetric: this avoids complex values and a failing matrix square root. With
    Σa = AᵀA and Σb = BᵀB it is also the sum of the singular values of ABᵀ, which is small for few
    vectors.

    Raises:
      ValueError: a set has fewer than two vectors or values that are not finite.
    """
    for x in (a, b):
        if len(x) < 2 or not np.isfinite(x).all():
            raise ValueError("the Fréchet distance needs two sets of at least two finite vectors")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    if a.shape[1] > min(len(a), len(b)):  # the same trace, of a smaller matrix
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    else:
        values, vectors = np.linalg.eigh(a.T @ a)
        half = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        between = np.linalg.eigvalsh(half @ (b.T @ b) @ half)
        root = np.sqrt(np.clip(between, 0, None)).sum()
    return float(mean @ mean + np.square(a).sum() + np.square(b).sum() - 2 * root)
