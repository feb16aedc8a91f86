"""Fréchet distance against closed forms and a matrix square root; SVM accuracy on real digits."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.svm import SVC

from monoformer_jax.data.digits import digits
from monoformer_jax.evaluation.frechet import frechet_distance


def test_distance_equals_the_formula_with_a_matrix_square_root():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    b = rng.normal(size=(100, 5)) @ rng.normal(size=(5, 5)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)


def test_distance_of_shifted_and_scaled_points():
    a = np.random.default_rng(0).normal(size=(50, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + np.array([1, 2, 2])) == pytest.approx(9)
    spread = np.trace(np.cov(a.T))
    around = a - a.mean(0)
    assert frechet_distance(around, 3 * around) == pytest.approx(4 * spread)


def test_constant_features_work_and_invalid_ones_raise():
    flat = np.zeros((10, 4))
    assert frechet_distance(flat, flat + 1) == pytest.approx(4)
    with pytest.raises(ValueError, match="at least two finite"):
        frechet_distance(flat, np.full((10, 4), np.nan))
    with pytest.raises(ValueError, match="at least two finite"):
        frechet_distance(flat[:1], flat)


def test_scores_of_real_digits():
    """The baselines of the scores: a Fréchet distance of 0.57, and an SVM accuracy of 99 %."""
    (train_x, train_y), (test_x, test_y) = digits("train"), digits("test")
    train_x, test_x = train_x.reshape(-1, 64), test_x.reshape(-1, 64)
    assert frechet_distance(train_x[:500], test_x) == pytest.approx(0.57, abs=0.01)
    assert SVC(C=10).fit(train_x, train_y).score(test_x, test_y) > 0.98
