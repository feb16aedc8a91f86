"""Example dataset: images of digits with their names, and sentences that count and add in words.

The digits are the 1,797 scans of 8×8 pixels in scikit-learn, in a stratified 80/20 split with seed 0.
A model of larger or colour images sees them enlarged, each pixel a square, and grey.
"""

from __future__ import annotations

import functools

import numpy as np
from einops import reduce, repeat

from monoformer_jax.errors import InputError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
         "eighteen")  # fmt: skip
READ_PROMPT = "read this: "
PAGE_PROMPT = "a digit and the next: "
SIDE = 8  # pixels


@functools.cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [n, 8, 8, 1] in [-1, 1] and labels [n] of "train" (1,437) or "test" (360)."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install -e '.[digits]'") from error
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}[split]


def fits(size: int) -> bool:
    """Whether the digits can be enlarged to images of this side."""
    return size > 0 and size % SIDE == 0


def enlarge(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """[…, 8, 8, 1] to [… , size, size, channels]; see `reduce_images` for the way back."""
    factor = size // SIDE
    return repeat(images, "... h w 1 -> ... (h p) (w q) c", p=factor, q=factor, c=channels)


def reduce_images(images: np.ndarray) -> np.ndarray:
    """[n, size, size, channels] to [n, 8, 8, 1], the means of squares and channels."""
    return reduce(images, "n (h p) (w q) c -> n h w 1", "mean", h=SIDE, w=SIDE)


def draw_prompt(digit: int) -> str:
    return f"draw {'an' if digit == 8 else 'a'} {NAMES[digit]}"


def follower(digit: int) -> int:
    """The next digit, 0 after 9."""
    return (digit + 1) % 10


def page_names(digit: int) -> str:
    """The text of a page, behind its images of a digit and of the next one."""
    return f"{NAMES[digit]}, {NAMES[follower(digit)]}"


def sentences() -> list[tuple[str, str]]:
    """(beginning, continuation) of all sentences of the "say" task; the beginning determines the rest.

    100 sums of two digits, and 90 counts up or down between two different digits.
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
