"""Distances between features against other libraries, closed forms and direct formulas; digits."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from monoformer_jax.config import SamplingConfig
from monoformer_jax.data.digits import NAMES, digits, enlarge
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import digits as of_digits
from monoformer_jax.evaluation import frechet
from monoformer_jax.evaluation.frechet import (
    InceptionScore,
    RunningStatistics,
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

# torch-fidelity 0.4.0 (torch 2.14) on the features below, and ADM's formula with scipy's sqrtm.
RECORDED = {
    "frechet": 20.446182416637043,
    "frechet_adm": 20.446182416637015,
    "kid": (5.143264579772949, 0.58948333797033),
    "precision": 0.05833333358168602,
    "recall": 0.2136363685131073,
    "inception_score": 8.58118569274934,
}


def features(count, dim, seed, shift, scale):
    rng = np.random.RandomState(seed)
    values = rng.standard_normal((count, 12)) @ rng.standard_normal((12, dim)) * scale
    return np.abs(values + 0.3 * rng.standard_normal((count, dim)) + shift).astype(np.float32)


def statistics(vectors, *sizes):
    running = RunningStatistics(vectors.shape[1])
    for part in np.split(vectors, np.cumsum(sizes)):
        if len(part):
            running.update(part)
    return running.result()


def test_figures_are_those_of_torch_fidelity_and_of_adm():
    a, b = features(1200, 48, 1, 0.1, 0.5), features(1100, 48, 2, 0.0, 0.45)
    of_parts = frechet_distance(statistics(a, 500, 1), statistics(b, 7, 600))
    for got in (of_parts, frechet_distance(a, b)):
        assert got == pytest.approx(RECORDED["frechet"], rel=1e-6)
        assert got == pytest.approx(RECORDED["frechet_adm"], rel=1e-6)
    assert kernel_distance(a, b, 20, 300) == pytest.approx(RECORDED["kid"], rel=1e-5)
    precision, recall = precision_recall(a, b, block=500)
    assert precision == pytest.approx(RECORDED["precision"], rel=1e-6)
    assert recall == pytest.approx(RECORDED["recall"], rel=1e-6)
    logits = 3 * np.random.RandomState(3).standard_normal((1000, 50)).astype(np.float32)
    score = InceptionScore(split=100)
    for part in np.split(logits, [30, 130, 777]):
        score.update(part)
    assert score.result() == pytest.approx(RECORDED["inception_score"], rel=1e-6)


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
    few = np.random.default_rng(1).normal(size=(2, 4, 30))  # the smaller matrix, of few vectors
    assert frechet_distance(*few) == pytest.approx(frechet_distance(*map(statistics, few)))


def test_distance_of_gaussians_of_known_mean_and_covariance():
    """Covariances with common eigenvectors: |μ|² + Σ (√λa - √λb)², spread over nine decades."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    for low in (1.0, 1e-9):
        a, b = np.geomspace(low, 4, 64), rng.permutation(np.geomspace(low, 2, 64))
        shift = rng.normal(size=64)
        sets = Statistics(np.zeros(64), (axes * a) @ axes.T), Statistics(shift, (axes * b) @ axes.T)
        want = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        assert frechet_distance(*sets) == pytest.approx(want, rel=1e-6)
    samples = rng.normal(size=(50_000, 4)) * [1, 2, 3, 4] + [100, 0, 0, 0]
    against = Statistics(np.array([101.0, 0, 0, 0]), np.diag([1.0, 4, 9, 16]))
    assert frechet_distance(statistics(samples), against) == pytest.approx(1, rel=0.05)


def test_statistics_of_batches(monkeypatch):
    """Of any sizes, and where a sum of squares would lose all digits."""
    monkeypatch.setattr(frechet, "_PART", 3)
    x = np.random.default_rng(0).normal(size=(101, 6)) * 1e-3 + 1e5
    for sizes in ([], [1], [2, 50, 40], [1] * 100):
        mean, covariance = statistics(x, *sizes)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-6, atol=1e-13)
    with pytest.raises(InputError, match="at least two feature vectors"):
        statistics(x[:1])


def test_precision_and_recall_equal_the_definition():
    rng = np.random.default_rng(0)
    for count, k, block in ((60, 3, 7), (60, 5, 1000), (4, 3, 2)):
        a, b = rng.normal(size=(count, 3)), rng.normal(size=(50, 3)) * 0.5 + 0.7
        radius_a, radius_b = (np.sort(cdist(x, x), 1)[:, k] for x in (a, b))
        between = cdist(a, b)
        want = ((between <= radius_b).any(1).mean(), (between <= radius_a[:, None]).any(0).mean())
        assert precision_recall(a, b, k, block) == pytest.approx(want)
        assert 0 < want[0] < 1
    assert precision_recall(b, b) == (1, 1)
    assert precision_recall(b, b + 100) == (0, 0)
    with pytest.raises(InputError, match="more than 3 vectors of each set, not 3"):
        precision_recall(a[:3], b)


def test_kernel_distance_of_all_vectors_is_unbiased():
    """With fewer than 1,000 vectors each subset is the set: the oracle is the sum over pairs."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)) + 0.5
    kernel = [[(x @ y / 3 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    same = [kernel[i][j] for i in range(40) for j in range(40) if i != j and (i < 20) == (j < 20)]
    other = [kernel[i][j] for i in range(20) for j in range(20, 40)]
    mean, deviation = kernel_distance(a, b)
    assert mean == pytest.approx(2 * np.mean(same) - 2 * np.mean(other))
    assert deviation == pytest.approx(0, abs=1e-9)


def test_inception_score_of_certain_and_of_uncertain_classes():
    certain = InceptionScore()
    certain.update(1000 * np.eye(7)[np.arange(70) % 7])
    assert certain.result() == pytest.approx(7)
    uncertain = InceptionScore(split=3)
    uncertain.update(np.zeros((10, 5)))
    assert uncertain.result() == pytest.approx(1)


def test_constant_features_work_and_invalid_ones_raise():
    flat = np.zeros((10, 4))
    assert frechet_distance(flat, flat + 1) == pytest.approx(4)
    assert frechet_distance(statistics(flat), statistics(flat + 1)) == pytest.approx(4)
    wrong = Statistics(np.zeros(4), np.diag([1.0, 1, 1, -0.1]))
    for bad, message in (
        (np.full((10, 4), np.nan), "not finite"),
        (Statistics(np.full(4, np.inf), np.eye(4)), "not finite"),
        (flat[:1], "at least two"),
        (flat[:, :3], "have 3 and 4 values"),
        (wrong, "eigenvalue -0.1 beside 1"),
    ):
        with pytest.raises(InputError, match=message):
            frechet_distance(bad, flat)
    for running in (RunningStatistics(4), InceptionScore()):
        with pytest.raises(InputError, match="not finite"):
            running.update(np.full((2, 4), np.nan))


def test_a_wrong_linear_algebra_library_is_noticed(monkeypatch):
    right = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda x: right(x) * (1 + 1e-4))
    x = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(ArithmeticError, match="computes wrong values on this processor"):
        frechet_distance(x, x + 1)


def test_digits_of_two_seeds(monkeypatch):
    """Every seed draws anew; the figures are means, and what needs no drawing is measured once."""
    drawn, real = [], digits("train")[0]

    def draw(model, labels, guidance, seed):
        drawn.append((guidance, seed))
        return real[np.random.default_rng(seed).integers(len(real), size=len(labels))]

    monkeypatch.setattr(of_digits, "draw", draw)
    sampling, layout = SimpleNamespace(guidance=2.0), SimpleNamespace(has_text=False)
    model = SimpleNamespace(config=SimpleNamespace(sampling=sampling, layout=layout))
    scores, shown = of_digits.evaluate(model, print, 2)
    assert drawn == [(2.0, 0), (1.0, 1), (2.0, 2), (1.0, 3)] and len(shown) == 500
    test = digits("test")[0].reshape(-1, 64)
    each = [frechet_distance(draw(0, range(500), 1, seed).reshape(-1, 64), test) for seed in (1, 3)]
    assert scores["frechet"] == pytest.approx(np.mean(each))
    assert scores["frechet_spread"] == pytest.approx(np.std(each, ddof=1))
    assert "frechet_real" in scores and "frechet_real_spread" not in scores


def test_pages_of_digits(monkeypatch):
    """Of a model that reads a page perfectly, and of one that repeats its first digit."""
    (pixels, labels), (train_x, train_y) = digits("test"), digits("train")
    known = {enlarge(x, 16, 3).tobytes(): int(y) for x, y in zip(pixels, labels)}
    of_label = {int(y): enlarge(x, 16, 3) for x, y in zip(train_x, train_y)}

    def read(prompt):
        assert prompt[0] == "a digit and the next: " and not any(x.denoise for x in prompt[1:])
        return [known[image.pixels.tobytes()] for image in prompt[1:]]

    def generate_images(model, prompts, *, sampling, seed, first):
        assert sampling.guidance == 1
        return np.stack([of_label[(read(prompt)[0] + step) % 10] for prompt in prompts])

    def generate_text(model, prompts, max_tokens):
        names = [[NAMES[digit] for digit in read(prompt)] for prompt in prompts]
        said = (f"{a}, {b}" if step else f"{a}, {a}" for a, b in names)
        return [SimpleNamespace(text=text, finish_reason="end") for text in said]

    for function in (generate_images, generate_text):
        monkeypatch.setattr(of_digits, function.__name__, function)
    model = SimpleNamespace(
        config=SimpleNamespace(
            sampling=SamplingConfig(guidance=2.0), data=SimpleNamespace(image_size=16),
            layout=SimpleNamespace(channels=3),
        ),
        tokenizer=ByteTokenizer(),
    )  # fmt: skip
    for step in (1, 0):  # to the next digit
        assert of_digits.next_accuracy(model) == of_digits.page_accuracy(model) == step


def test_scores_of_real_digits():
    """The baselines of the scores: a Fréchet distance of 0.57, and an SVM accuracy of 99 %."""
    (train_x, train_y), (test_x, test_y) = digits("train"), digits("test")
    train_x, test_x = train_x.reshape(-1, 64), test_x.reshape(-1, 64)
    assert frechet_distance(train_x[:500], test_x) == pytest.approx(0.57, abs=0.01)
    assert SVC(C=10).fit(train_x, train_y).score(test_x, test_y) > 0.98
