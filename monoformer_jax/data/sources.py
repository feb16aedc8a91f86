"""Where documents come from: a source is a sequence of examples and a way to write one down.

The digits are the 1,797 scanned 8×8 digits that scikit-learn ships, split 80/20 by label with seed 0.
"draw" paints the digit that is asked for, "read" names the digit that is shown, "say" counts and adds
in words. Every other source is a folder of records: captions with an image to paint, or conversations
with or without an image to look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monoformer_jax.config import DataConfig
from monoformer_jax.data.digits import NAMES, READ_PROMPT, digits, draw_prompt, sentences
from monoformer_jax.data.documents import EndOfTurn, Image, Part, UntrainedText
from monoformer_jax.data.records import ANSWER, ASK, Example, Records, check_shape
from monoformer_jax.errors import require

Parts = list[Part]


@dataclasses.dataclass(frozen=True)
class Source:
    """`write(example, rng)` gives the parts of a document; rng is the example's own."""

    examples: Sequence[Any]
    write: Callable[[Any, np.random.Generator], Parts]


def _draw(c: DataConfig) -> Source:
    def write(example, rng):
        image, label = example
        prompt = [] if rng.random() < c.prompt_dropout else [draw_prompt(label)]
        return [*prompt, Image(image, denoise=True)]

    return Source(_training_digits(c), write)


def _read(c: DataConfig) -> Source:
    def write(example, rng):
        image, label = example
        return [
            READ_PROMPT,
            Image(_shifted(image, c.shift_pixels, rng), denoise=False),
            NAMES[label],
        ]

    return Source(_training_digits(c), write)


def _training_digits(c: DataConfig) -> list[tuple[np.ndarray, int]]:
    require(c.image_size == 8, f"data.image_size={c.image_size}, but the digits are 8×8")
    return list(zip(*digits("train")))


def _say(c: DataConfig) -> Source:
    return Source([a + b for a, b in sentences()], lambda sentence, rng: [sentence])


def _shifted(image: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """The image moved by up to `most` pixels each way, background coming in."""
    height, width, _ = image.shape
    y, x = rng.integers(0, 2 * most + 1, 2)
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), constant_values=-1)
    return padded[y : y + height, x : x + width]


def _records(c: DataConfig, name: str) -> Source:
    records = Records(c.records[name])
    check_shape(name, records, c.image_size)

    def write(example: Example, rng):
        image = []
        if example.mean is not None:
            mean, logvar = (x.astype(np.float32) for x in (example.mean, example.logvar))
            image = [Image(mean, denoise=bool(example.captions), logvar=logvar)]
        if not example.captions:
            return [*image, *conversation(example.messages)]
        prompt = [] if rng.random() < c.prompt_dropout else [str(rng.choice(example.captions))]
        return [*prompt, *image]

    return Source(records, write)


def conversation(messages: Sequence[str]) -> Parts:
    """What is asked is not learned; every answer but the last is followed by its own </s>."""
    parts = []
    for asked, answer in zip(messages[::2], messages[1::2], strict=True):
        parts += [UntrainedText(ASK.format(asked)), ANSWER.format(answer), EndOfTurn()]
    return parts[:-1]


SOURCES: dict[str, Callable[[DataConfig], Source]] = {"draw": _draw, "read": _read, "say": _say}


def open_sources(c: DataConfig) -> dict[str, Source]:
    """The sources of the mixture that have a weight.

    Raises:
      InputError: a name that is neither one of `SOURCES` nor in data.records, or what the source
        itself refuses.
    """
    for name in c.mixture:
        require(
            name in SOURCES or name in c.records,
            f"data.mixture.{name} is no source; there are {', '.join(SOURCES)}, and the folders of "
            f"records that data.records names: --config.data.records.{name}=DIR",
        )
    opened = {}
    for name, weight in c.mixture.items():
        if weight > 0:
            opened[name] = _records(c, name) if name in c.records else SOURCES[name](c)
    return opened
