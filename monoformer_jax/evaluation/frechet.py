"""Fréchet distance between two sets of feature vectors."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of two sets of vectors, each [n, d] (Heusel et al. 2017).

    The trace of the square root is computed as the sum of the square roots of the eigenvalues of
    Σa^½ Σb Σa^½, which is symmetric: this avoids complex values and a failing matrix square root.

    Raises:
      ValueError: a set has fewer than two vectors or values that are not finite.
    """
    for x in (a, b):
        if len(x) < 2 or not np.isfinite(x).all():
            raise ValueError("the Fréchet distance needs two sets of at least two finite vectors")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[1] > len(a) + len(b):  # all vectors lie in a smaller space: its coordinates will do
        axes = np.linalg.svd(np.concatenate([a, b]), full_matrices=False)[2]
        a, b = a @ axes.T, b @ axes.T
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    between = np.linalg.eigvalsh(root @ cov_b @ root)
    return float(
        mean @ mean
        + np.trace(cov_a)
        + np.trace(cov_b)
        - 2 * np.sqrt(np.clip(between, 0, None)).sum()
    )
