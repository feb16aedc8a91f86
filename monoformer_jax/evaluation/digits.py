"""Metrics of a model trained on the digits: image generation, digit reading, text completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from monoformer_jax.data.digits import (
    NAMES,
    PAGE_PROMPT,
    READ_PROMPT,
    digits,
    draw_prompt,
    enlarge,
    follower,
    page_names,
    reduce_images,
    sentences,
)
from monoformer_jax.data.documents import Image
from monoformer_jax.evaluation.frechet import frechet_distance
from monoformer_jax.evaluation.record import with_spread
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import generate_text

_BATCH = 250


def draw(model, labels: np.ndarray, guidance: float, seed: int) -> np.ndarray:
    """Generates an image for each label, reduced to [n, 8, 8, 1] and clipped to [-1, 1]."""
    sampling = dataclasses.replace(model.config.sampling, guidance=guidance)
    return _generate(model, [[draw_prompt(digit)] for digit in labels], sampling, seed)


def _generate(model, prompts: list, sampling, seed: int) -> np.ndarray:
    """An image for each prompt, reduced to [n, 8, 8, 1] and clipped to [-1, 1]."""
    images = [
        generate_images(model, prompts[i : i + _BATCH], sampling=sampling, seed=seed, first=i)
        for i in range(0, len(prompts), _BATCH)
    ]
    return np.clip(reduce_images(np.concatenate(images)), -1, 1)


def draw_accuracy(drawn: np.ndarray, labels: np.ndarray) -> float:
    """Share of drawings that an SVM, trained only on real training digits, takes for their label."""
    train_x, train_y = digits("train")  # it names the extra that has scikit-learn
    from sklearn.svm import SVC

    return float((SVC(C=10).fit(_flat(train_x), train_y).predict(_flat(drawn)) == labels).mean())


def read_accuracy(model) -> float:
    """Share of the 360 test digits that are named exactly."""
    pixels, labels = digits("test")
    shown = [[READ_PROMPT, image] for image in _shown(model, pixels)]
    return exact(model, shown, [NAMES[digit] for digit in labels])


def next_accuracy(model) -> float:
    """Share of the 360 test digits, each the first image of a page, behind which the next digit is
    generated, see `draw_accuracy`; unguided."""
    pixels, labels = digits("test")
    pages = [[PAGE_PROMPT, first] for first in _shown(model, pixels)]
    sampling = dataclasses.replace(model.config.sampling, guidance=1.0)
    return draw_accuracy(_generate(model, pages, sampling, seed=0), follower(labels))


def page_accuracy(model) -> float:
    """Share of pages of two test digits of which both are named exactly."""
    pixels, labels = digits("test")
    shown, nexts = _shown(model, pixels), {}
    for image, label in zip(shown, labels):
        nexts[label] = image
    pages = [[PAGE_PROMPT, first, nexts[follower(label)]] for first, label in zip(shown, labels)]
    return exact(model, pages, [page_names(label) for label in labels])


def _shown(model, pixels: np.ndarray) -> list[Image]:
    """Digits as images of the model's size that are not to be generated."""
    pictures = enlarge(pixels, model.config.data.image_size, model.config.layout.channels)
    return [Image(picture, denoise=False) for picture in pictures]


def say_accuracy(model) -> float:
    """Share of the training sentences that are completed exactly."""
    said = sentences()
    return exact(model, [[start] for start, _ in said], [end for _, end in said])


def opens_image(model, prompts: list) -> float:
    """Share of prompts to draw whose greedy answer is exactly one image followed by </s>."""
    session = Session(model, len(prompts))
    session.append(prompts)
    replies, rows = session.generate(max_tokens=8), range(len(prompts))
    ended = [session.document(row)["tokens"][-1] == model.tokenizer.eos_id for row in rows]
    one = [len(reply) == 1 and not isinstance(reply[0], str) for reply in replies]
    return float(np.logical_and(one, ended).mean())


def exact(model, prompts: list, answers: list[str]) -> float:
    """Share of prompts whose greedy completion is exactly the answer followed by </s>."""
    most = max(len(model.tokenizer.encode(answer)) for answer in answers) + 1
    right = 0
    for i in range(0, len(prompts), _BATCH):
        got = generate_text(model, prompts[i : i + _BATCH], max_tokens=most)
        pairs = zip(got, answers[i : i + _BATCH])
        right += sum(g.finish_reason == "end" and g.text == answer for g, answer in pairs)
    return right / len(prompts)


def evaluate(
    model, log: Callable[[str], None], seeds: int = 1
) -> tuple[dict[str, float], np.ndarray]:
    """Returns scores of a `monoformer_jax.Model` and 500 guided images, labels 0 to 9 repeated.

    The figures of generated images are means over `seeds`, with KEY_spread, see `record.with_spread`.

    draw_accuracy: of guided images, see the function.
    frechet: Fréchet distance in pixel space of 500 unguided images to the real test digits;
      frechet_real is that of 500 real training digits.
    read_accuracy, say_accuracy, opens_image: see the functions; the last of 100 prompts.
    next_accuracy, page_accuracy: see the functions; of a model that was trained on pages.
    The last five are absent for a model that generates images only.
    """
    labels, guidance = np.tile(np.arange(10), 50), model.config.sampling.guidance
    (train_x, _), (test_x, _) = digits("train"), digits("test")
    drawn, found = [], []
    for seed in range(0, 2 * seeds, 2):
        log("generating 500 digits with guidance")
        drawn.append(draw(model, labels, guidance, seed))
        log("generating 500 digits without guidance")
        unguided = draw(model, labels, 1.0, seed + 1)
        distance = frechet_distance(_flat(unguided), _flat(test_x))
        found.append({"draw_accuracy": draw_accuracy(drawn[-1], labels), "frechet": distance})
    real = {"frechet_real": frechet_distance(_flat(train_x[:500]), _flat(test_x))}
    scores, drawn = with_spread(found) | real, drawn[0]
    if not model.config.layout.has_text:
        log("the model generates images only: reading, sentences and its choice are not measured")
        return scores, drawn
    log("reading 360 test digits")
    read = read_accuracy(model)
    log("answering 100 prompts to draw")
    opened = opens_image(model, [[draw_prompt(number % 10)] for number in range(100)])
    log("completing the sentences")
    scores |= {"read_accuracy": read, "opens_image": opened, "say_accuracy": say_accuracy(model)}
    if model.config.data.mixture.get("page"):
        log("continuing 360 pages")
        scores |= {"next_accuracy": next_accuracy(model), "page_accuracy": page_accuracy(model)}
    return scores, drawn


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)
