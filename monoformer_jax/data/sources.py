"""Data sources: a source is a sequence of examples, and a function from an example to parts.

Digits tasks (see `digits`): "draw" generates the requested digit, "read" names the digit in an image,
"say" is counting and addition in words, "page" has two images to generate, of any digit and of the next
one, and their names behind them, so what comes later must be read from the images before it. Tasks of
`emoji`: "draw_emoji" generates the named drawing, "name_emoji" names one; held-out combinations are in
neither. Every other source is a folder of records, whose examples are lists of parts: captions with an
image to generate, conversations with or without images, or others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monoformer_jax.config import DataConfig
from monoformer_jax.data.digits import (
    NAMES,
    PAGE_PROMPT,
    READ_PROMPT,
    digits,
    draw_prompt,
    enlarge,
    fits,
    follower,
    page_names,
    sentences,
)
from monoformer_jax.data.documents import Image, Part, Prompt
from monoformer_jax.data.emoji import NAME_PROMPT, emoji
from monoformer_jax.data.records import Records, check_example, check_shape
from monoformer_jax.data.templates import complete_prompt
from monoformer_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Source:
    """`to_parts(example, rng)` returns the parts of a document; rng is seeded per example.

    An example for which it or `examples` raises `BadExample` or OSError is skipped and counted.
    """

    examples: Sequence[Any]
    to_parts: Callable[[Any, np.random.Generator], Sequence[Part | Prompt]]
    notice: str = ""  # a line that training prints, such as a licence


def _draw(c: DataConfig, channels: int) -> Source:
    def to_parts(example, rng):
        image, label = example
        image = enlarge(image, c.image_size, channels)
        return [Prompt((draw_prompt(label),)), Image(image, denoise=True)]

    return Source(_training_digits(c), to_parts)


def _read(c: DataConfig, channels: int) -> Source:
    def to_parts(example, rng):
        image, label = example
        image = enlarge(_shifted(image, c.shift_pixels, rng), c.image_size, channels)
        return [READ_PROMPT, Image(image, denoise=False), NAMES[label]]

    return Source(_training_digits(c), to_parts)


def _training_digits(c: DataConfig) -> list[tuple[np.ndarray, int]]:
    require(
        fits(c.image_size),
        f"data.image_size={c.image_size} is not a multiple of 8: the digits are 8×8",
    )
    return list(zip(*digits("train")))


def _say(c: DataConfig, channels: int) -> Source:
    return Source([a + b for a, b in sentences()], lambda sentence, rng: [sentence])


def _page(c: DataConfig, channels: int) -> Source:
    examples = _training_digits(c)
    of_label = [[image for image, label in examples if label == digit] for digit in range(10)]

    def to_parts(example, rng):
        image, label = example
        nexts = of_label[follower(label)]
        pair = (image, nexts[rng.integers(len(nexts))])
        images = [Image(enlarge(x, c.image_size, channels), denoise=True) for x in pair]
        return [Prompt((PAGE_PROMPT,)), *images, page_names(label)]

    return Source(examples, to_parts)


def _draw_emoji(c: DataConfig, channels: int) -> Source:
    def to_parts(drawing, rng):
        wordings = [f"draw {name}" for name in (*drawing.names, *drawing.wordings)]
        return [Prompt(tuple(wordings)), Image(drawing.pixels, denoise=True)]

    drawings = emoji(c.emoji_subset, c.image_size, c.emoji_split)
    return Source(drawings.train, to_parts, str(drawings))


def _name_emoji(c: DataConfig, channels: int) -> Source:
    def to_parts(drawing, rng):
        prompt = [NAME_PROMPT, Image(drawing.pixels, denoise=False)]
        name = drawing.names[rng.integers(len(drawing.names))]
        return [*complete_prompt(prompt, c.end_of_prompt), name]

    drawings = emoji(c.emoji_subset, c.image_size, c.emoji_split)
    return Source(drawings.train, to_parts, str(drawings))


def _shifted(image: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts an image by up to `most` pixels in each direction, filled with background."""
    height, width, _ = image.shape
    y, x = rng.integers(0, 2 * most + 1, 2)
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), constant_values=-1)
    return padded[y : y + height, x : x + width]


def _records(c: DataConfig, name: str, channels: int) -> Source:
    records = Records(c.records[name])
    check_shape(name, records, c.image_size, channels)

    def to_parts(example, rng):
        check_example(example, c.image_size, channels)
        return example

    return Source(records, to_parts)


SOURCES: dict[str, Callable[[DataConfig, int], Source]] = {
    "draw": _draw, "read": _read, "say": _say, "page": _page, "draw_emoji": _draw_emoji,
    "name_emoji": _name_emoji,
}  # fmt: skip


def open_sources(c: DataConfig, channels: int) -> dict[str, Source]:
    """Opens the sources of the mixture with a weight above 0.

    Args:
      c: data config.
      channels: channels of the model's images, which those of records must have; digits get them.

    Raises:
      InputError: a name that is neither in `SOURCES` nor in data.records, or an invalid source.
    """
    for name in c.mixture:
        require(
            name in SOURCES or name in c.records,
            f"data.mixture.{name} is not a source: choose from {', '.join(SOURCES)}, or give its "
            f"records with --config.data.records.{name}=DIR",
        )
    opened = {}
    for name, weight in c.mixture.items():
        if weight > 0:
            stored = name in c.records
            opened[name] = _records(c, name, channels) if stored else SOURCES[name](c, channels)
    return opened
