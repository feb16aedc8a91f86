"""The judge of drawings, on constructed sets whose scores are known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from monoformer_jax.evaluation.frechet import frechet_distance
from monoformer_jax.evaluation.retrieval import (
    CaptionedSet,
    baselines,
    judge,
    judge_names,
    naming_baselines,
    nearest_caption,
    squared_distances,
)

BASES, TONES = ("fist", "ear", "nose"), ("light", "dark")
HELD_OUT = np.array([1, 4])  # fist dark, nose light


@pytest.fixture
def known():
    """Six pictures of 2×2: the base is the grey of the first row, the tone that of the second."""
    pictures, names, labels = [], [], []
    for i, base in enumerate(BASES):
        for j, tone in enumerate(TONES):
            pictures.append(np.stack([np.full((2, 1), i * 0.8 - 0.8), np.full((2, 1), 0.2 * j)]))
            names.append((f"{base}, {tone} tone",))
            labels.append(((base, (tone,)),))
    trained = np.ones(6, bool)
    trained[HELD_OUT] = False
    return CaptionedSet(np.stack(pictures), names, labels, trained)


def test_perfect_drawings_are_right_in_everything(known):
    scores = judge(known, known.pictures[HELD_OUT], HELD_OUT)
    for name in ("top1", "top5", "both_right", "base_right", "attribute_right"):
        assert scores[name] == 1
    for name in ("memorised_share", "pixel_error", "frechet"):
        assert scores[name] == pytest.approx(0, abs=1e-6)
    assert scores["frechet_train"] > 0.01


def test_copies_of_trained_pictures_are_memorised(known):
    """The other tone of the same base: the base is right, the truth comes second."""
    scores = judge(known, known.pictures[[0, 5]], HELD_OUT)
    assert (scores["top1"], scores["top5"]) == (0, 1)
    assert (scores["both_right"], scores["base_right"], scores["attribute_right"]) == (0, 1, 0)
    assert scores["memorised_share"] == 1
    assert scores["pixel_error"] == pytest.approx(0.1)  # half of the pixels differ by 0.2


def test_one_drawing_of_two_is_right(known):
    # Nearest to the fist, dark; and to the ear, light: the nose's tone, the wrong base.
    drawn = known.pictures[[1, 2]] + 0.05
    scores = judge(known, drawn, HELD_OUT)
    assert (scores["top1"], scores["both_right"]) == (0.5, 0.5)
    assert (scores["base_right"], scores["attribute_right"]) == (0.5, 1)
    assert scores["memorised_share"] == 0.5
    # The nose's truth is at 0.8 - 0.05 in one row and at 0.05 in the other.
    assert scores["pixel_error"] == pytest.approx((0.05 + (0.75 + 0.05) / 2) / 2)
    # Six pictures: the truth is never farther than the fifth nearest, unless it is the last.
    last = judge(known, known.pictures[[0, 5]], np.array([5, 0]))
    assert (last["top5"], last["top1"]) == (0, 0)


def test_drawings_are_clipped_and_twins_count_as_right(known):
    twins = CaptionedSet(
        known.pictures, known.names, [*known.labels[:2], (*known.labels[2], known.labels[1][0]),
                                      *known.labels[3:]], known.trained,
    )  # fmt: skip
    scores = judge(twins, known.pictures[[2, 4]], HELD_OUT)
    assert scores["both_right"] == 1 and scores["top1"] == 0.5
    white = np.full((2, 2, 2, 1), 1.0)
    assert judge(known, 9 * white, HELD_OUT) == judge(known, white, HELD_OUT)


def test_names(known):
    assert judge_names(known, ["fist, dark tone", "ear, light tone"], HELD_OUT) == {
        "names_exact": 0.5, "names_base": 0.5, "names_attribute": 1.0, "names_by_parts": 0.75,
    }  # fmt: skip
    nothing = judge_names(known, ["", "fist, dark tone and more"], HELD_OUT)
    assert set(nothing.values()) == {0.0}


def test_baselines(known):
    made = baselines(known, HELD_OUT, seed=0)
    # The nearest caption among the trained: the same base in the other tone.
    np.testing.assert_array_equal(made["nearest_train"], known.pictures[[0, 5]])
    np.testing.assert_allclose(made["mean"][0], known.pictures[known.trained].mean(0))
    everything = known.pictures.reshape(6, -1).tolist()
    assert all(x in everything for x in made["random"].reshape(2, -1).tolist())
    many = baselines(known, np.tile(HELD_OUT, 500), seed=1)
    spread = many["noisy_truth"] - known.pictures[np.tile(HELD_OUT, 500)]
    assert spread.std() == pytest.approx(0.25, rel=0.05) and abs(spread.mean()) < 0.02
    scores = judge(known, many["random"], np.tile(HELD_OUT, 500))
    assert scores["top1"] == pytest.approx(1 / 6, abs=0.04)
    assert scores["base_right"] == pytest.approx(1 / 3, abs=0.05)
    answers = naming_baselines(known, HELD_OUT)
    assert answers["nearest_train"] == ["fist, light tone", "nose, dark tone"]


def test_the_nearest_caption_shares_the_rarest_words():
    captions = ["red ear, dark tone", "left fist, light tone", "right fist, dark tone"]
    assert nearest_caption(["left fist, dark tone", "ear", "no such words"], captions).tolist() == [
        1, 0, 0,
    ]  # fmt: skip


def test_squared_distances_are_those_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 4, 4, 2)), rng.normal(size=(5, 4, 4, 2))
    want = np.square(a[:, None] - b[None]).sum((2, 3, 4))
    np.testing.assert_allclose(squared_distances(a, b), want, atol=1e-8)


def test_the_frechet_distance_of_few_long_vectors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 20)) + 1, 2 * rng.normal(size=(5, 20))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    small = 1e-9 * np.eye(20)
    root = sqrtm((cov_a + small) @ (cov_b + small)).real
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-3)
