"""Metrics of a model trained on emoji: drawings and names, of trained and of held-out captions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from monoformer_jax.data.documents import Image
from monoformer_jax.data.emoji import NAME_PROMPT, Emoji, emoji
from monoformer_jax.data.templates import complete_prompt
from monoformer_jax.evaluation.digits import opens_image
from monoformer_jax.evaluation.record import with_spread
from monoformer_jax.evaluation.retrieval import (
    CaptionedSet,
    baselines,
    judge,
    judge_names,
    naming_baselines,
    squared_distances,
)
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.text import generate_text

_BATCH = 100
_TRAINED = 80  # trained captions that are drawn, and pictures that are named
_SHOWN = 10  # held-out captions in the figure


def evaluate(model, log: Callable[[str], None], seeds: int = 1) -> tuple[dict[str, float], tuple]:
    """Returns scores of a `monoformer_jax.Model`, and the arguments of `plots.comparison`.

    The figures of drawings are means over `seeds`, with KEY_spread, see `record.with_spread`.

    heldout_*: `retrieval.judge` of drawings of all held-out captions, and `retrieval.judge_names` of
      the held-out pictures; memorised_share and names_by_parts are of them, too, and so is
      heldout_opens_image, see `digits.opens_image`.
    train_*: the same of 80 trained ones, drawn at random with seed 0.
    nearest_train_*, random_*, mean_*, noisy_truth_*: of held-out ones, what needs no model, see
      `retrieval.baselines` and `retrieval.naming_baselines`.
    Names are absent for a model that generates images only.
    """
    c = model.config.data
    drawings = emoji(c.emoji_subset, c.image_size, c.emoji_split)
    log(str(drawings))
    known = captioned_set(drawings)
    held_out, trained = np.flatnonzero(~known.trained), np.flatnonzero(known.trained)
    trained = np.random.default_rng(0).permutation(trained)[:_TRAINED]
    log(f"drawing {len(held_out)} held-out and {len(trained)} trained captions")
    drawn = [draw(model, known, held_out, seed) for seed in range(seeds)]
    scores = _prefixed("heldout", with_spread([judge(known, x, held_out) for x in drawn]))
    of_trained = [judge(known, draw(model, known, trained, seed), trained) for seed in range(seeds)]
    scores |= _prefixed("train", with_spread(of_trained))
    for key in [key for key in scores if key.startswith("train_memorised")]:
        del scores[key]
    for baseline, pictures in baselines(known, held_out).items():
        scores |= _prefixed(baseline, judge(known, pictures, held_out))
    if model.config.layout.has_text:
        log(f"naming {len(held_out)} held-out and {len(trained)} trained pictures")
        for prefix, shown in (("heldout", held_out), ("train", trained)):
            answers = name(model, known, shown)
            scores |= _prefixed(prefix, judge_names(known, answers, shown))
        scores["names_by_parts"] = scores.pop("heldout_names_by_parts")
        scores["heldout_opens_image"] = opens_image(model, draw_prompts(model, known, held_out))
        for baseline, answers in naming_baselines(known, held_out).items():
            scores |= _prefixed(baseline, judge_names(known, answers, held_out))
    for key in [key for key in scores if key.startswith("heldout_memorised")]:
        scores[key.removeprefix("heldout_")] = scores.pop(key)
    return scores, _shown(drawings, known, drawn[0], held_out)


def captioned_set(drawings: Emoji) -> CaptionedSet:
    """All drawings of a subset, the trained ones first."""
    everything = [*drawings.train, *drawings.held_out]
    return CaptionedSet(
        np.stack([drawing.pixels for drawing in everything]),
        [drawing.names for drawing in everything],
        [drawing.labels for drawing in everything],
        np.arange(len(everything)) < len(drawings.train),
    )


def draw_prompts(model, known: CaptionedSet, chosen: np.ndarray) -> list:
    """The prompt to draw each chosen picture, by its first name."""
    end = model.config.data.end_of_prompt
    return [complete_prompt([f"draw {known.names[i][0]}"], end) for i in chosen]


def draw(model, known: CaptionedSet, chosen: np.ndarray, seed: int) -> np.ndarray:
    """Draws the first name of each chosen picture, [n, size, size, 3], with the config's settings."""
    prompts = draw_prompts(model, known, chosen)
    images = [
        generate_images(model, prompts[i : i + _BATCH], seed=seed, first=i)
        for i in range(0, len(prompts), _BATCH)
    ]
    return np.concatenate(images)


def name(model, known: CaptionedSet, shown: np.ndarray) -> list[str]:
    """The greedy names of pictures of the set; "" where the model does not end one."""
    most = 1 + max(len(model.tokenizer.encode(name)) for names in known.names for name in names)
    end = model.config.data.end_of_prompt
    prompts = [
        complete_prompt([NAME_PROMPT, Image(known.pictures[i], denoise=False)], end) for i in shown
    ]
    answers = []
    for i in range(0, len(prompts), _BATCH):
        answers += generate_text(model, prompts[i : i + _BATCH], max_tokens=most)
    return [answer.text if answer.finish_reason == "end" else "" for answer in answers]


def _shown(
    drawings: Emoji, known: CaptionedSet, drawn: np.ndarray, held_out: np.ndarray
) -> tuple[list[str], dict[str, np.ndarray], str]:
    """Captions, columns and note of a figure of held-out captions at random, seed 0."""
    some = np.sort(np.random.default_rng(0).permutation(len(held_out))[:_SHOWN])
    trained = known.pictures[known.trained]
    nearest = trained[squared_distances(drawn[some], trained).argmin(1)]
    truth = known.pictures[held_out[some]]
    columns = {"truth": truth, "drawing": drawn[some], "nearest trained": nearest}
    return [known.names[i][0] for i in held_out[some]], columns, drawings.attribution


def _prefixed(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{key}": value for key, value in scores.items()}
