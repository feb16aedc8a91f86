"""Row mixes for the attention benchmark: captions and images, packed or one document per row."""

from __future__ import annotations

import dataclasses

import numpy as np

from monoformer_jax.attention import IntervalMask

SHORTEST_TEXT, LONGEST_TEXT = 64, 256  # tokens, drawn uniformly


@dataclasses.dataclass(frozen=True)
class Mix:
    """Documents of one text and one image, sampled until the row is full.

    Args:
      length: tokens per row.
      image: patches per image; 0 for text only.
      image_first: whether the image comes before the text.
      packed: whether to pack as many documents as fit; otherwise one document per row.
    """

    length: int
    image: int
    image_first: bool = False
    packed: bool = True


MIXES = {
    "text to image 256, 512 unpacked": Mix(512, 256, packed=False),
    "text to image 256, packed 2048": Mix(2048, 256),
    "image to text 256, packed 2048": Mix(2048, 256, image_first=True),
    "text to image 1024, packed 2048": Mix(2048, 1024),
    "text to image 256, packed 4096": Mix(4096, 256),
    "text to image 1024, packed 4096": Mix(4096, 1024),
    "text, one document of 4096": Mix(4096, 0, packed=False),
}


def sample_rows(mix: Mix, count: int, seed: int = 0) -> IntervalMask:
    """Samples the masks of `count` rows, int32 [count, length]; deterministic for a given seed."""
    rng = np.random.default_rng(seed)
    start = np.zeros((count, mix.length), np.int32)
    stop = np.zeros((count, mix.length), np.int32)
    for row in range(count):
        at = 0
        while True:
            text = int(rng.integers(SHORTEST_TEXT, LONGEST_TEXT + 1)) if mix.image else mix.length
            end = at + text + mix.image
            if end > mix.length:
                break
            image = at if mix.image_first else at + text
            start[row, at:end] = at
            stop[row, at:end] = np.arange(at, end) + 1
            stop[row, image : image + mix.image] = image + mix.image
            at = end
            if not mix.packed:
                break
        start[row, at:] = stop[row, at:] = at
    return IntervalMask(start, stop)
