"""Where documents come from: a source is a sequence of examples and a way to write one down.

The digits are the 1,797 scanned 8×8 digits that scikit-learn ships, split 80/20 by label with seed 0.
"draw" paints the digit that is asked for, "read" names the digit that is shown, "say" counts and adds
in words. Every other source is a folder of records: captions with an image to paint, or conversations
with or without an image to look at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monoformer_jax.config import DataConfig, require
from monoformer_jax.data.documents import Asked, End, Image, Part
from monoformer_jax.data.records import ANSWER, ASK, Example, Records, check_shape

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
         "eighteen")  # fmt: skip
READ_PROMPT = "read this: "

Parts = list[Part]


@dataclasses.dataclass(frozen=True)
class Source:
    """`write(example, rng)` gives the parts of a document; rng is the example's own."""

    examples: Sequence[Any]
    write: Callable[[Any, np.random.Generator], Parts]


@functools.cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [n, 8, 8, 1] in [-1, 1] and labels [n] of "train" (1,437) or "test" (360)."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install -e '.[digits]'") from error
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}[split]


def draw_prompt(digit: int) -> str:
    return f"draw {'an' if digit == 8 else 'a'} {NAMES[digit]}"


def sentences() -> list[tuple[str, str]]:
    """(beginning, continuation) of everything that "say" is trained on; each follows from the other.

    100 sums of two digits, and counting up and down between any two of zero to nine.
    """
    said = [
        (f"{NAMES[a]} plus {NAMES[b]} is", f" {NAMES[a + b]}") for a in range(10) for b in range(10)
    ]
    for a in range(10):
        for b in range(10):
            if a != b:
                step = 1 if a < b else -1
                count = " ".join(NAMES[n] for n in range(a, b + step, step))
                said.append((f"count from {NAMES[a]} to {NAMES[b]}:", f" {count}"))
    return said


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
        parts += [Asked(ASK.format(asked)), ANSWER.format(answer), End()]
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
