"""Decoding of a dataset's images in worker processes, for `prepare_data`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from monoformer_jax.data.documents import Part, Prompt
from monoformer_jax.data.forms import RawImage
from monoformer_jax.data.image_io import crop
from monoformer_jax.data.pipeline import cores, in_workers
from monoformer_jax.errors import InputError

_CHUNK = 16  # examples that pass through grain together, which costs as much as for one
_WORTH = 512  # examples from which on starting worker processes pays


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An example with its images decoded, or the sentence that says why it cannot be read.

    Attributes:
      pixels: uint8 [images, size, size, channels]; each is a RawImage in `parts`.
      reason: why in a word, see `BadExample`.
      name: where the example stands: FILE:LINE.
    """

    parts: Sequence[Part | Prompt | RawImage] = ()
    pixels: np.ndarray | None = None
    error: str | None = None
    reason: str = ""
    name: str = ""


def default_workers(examples: int) -> int:
    """One process per core, or none if there are too few examples to make up for their start."""
    return cores() if examples >= _WORTH else 0


def decode_examples(
    examples: Sequence, size: int, workers: int, channels: int = 3
) -> Iterator[Decoded]:
    """Decodes the examples in order.

    Args:
      examples: see `raw.open_raw`.
      size: side of the central square, in pixels.
      workers: processes among which the examples are divided; 0: threads of this process.
      channels: 3, or 1 for grey.
    """
    threads = 1 if workers else cores()
    decoded = grain.MapDataset.source(_Chunks(examples)).map(Decode(size, channels))
    made = decoded.to_iter_dataset(grain.ReadOptions(threads, 4 * threads))
    with contextlib.closing(iter(in_workers(made, workers, 4) if workers else made)) as chunks:
        for chunk in chunks:
            # A copy: shared memory that is in use when the command ends is reported as lost.
            pixels, begin = np.array(chunk.pop("pixels")), 0
            for example in chunk["examples"]:
                end = begin + sum(isinstance(part, RawImage) for part in example.parts)
                yield dataclasses.replace(example, pixels=pixels[begin:end])
                begin = end


class _Chunks(Sequence):
    """Chunks of examples. grain logs the repr, which would contain all examples."""

    def __init__(self, examples: Sequence):
        self._examples = examples

    def __len__(self) -> int:
        return -(-len(self._examples) // _CHUNK)

    def __getitem__(self, number):
        return self._examples[number * _CHUNK : (number + 1) * _CHUNK]

    def __repr__(self) -> str:
        return f"{len(self._examples)} examples"


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decodes a chunk of examples; `size` is the side of the central square, in pixels."""

    size: int
    channels: int = 3

    def __call__(self, examples: Sequence) -> dict[str, Any]:
        """The pixels of all examples are one array, which passes on in shared memory if it is large;
        grain pickles the rest."""
        decoded = [self.decode(example) for example in examples]
        images = [image for _, pixels in decoded for image in pixels]
        none = np.zeros((0, self.size, self.size, self.channels), np.uint8)
        return {
            "pixels": np.stack(images) if images else none,
            "examples": [example for example, _ in decoded],
        }

    def decode(self, example) -> tuple[Decoded, list[np.ndarray]]:
        """Returns the example without its pixels, and its pixels, an array per image. An error is a
        value, so that one bad image costs one example."""
        name = ""
        try:
            raw = example()
            name = raw.name
            pixels = [
                crop(part.open(), self.size, self.channels)
                for part in raw.parts
                if isinstance(part, RawImage)
            ]
        except Exception as error:  # also a type that no reader foresaw, or a failing disk
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            where = "" if name in str(error) else f"{name}: "
            reason = "schema" if kind == "" else "unreadable"
            reason = getattr(error, "reason", reason)
            return Decoded(error=f"{where}{kind}{error}", reason=reason), []
        # Without its function, which may hold the bytes of the file.
        parts = [
            dataclasses.replace(part, open=None) if isinstance(part, RawImage) else part
            for part in raw.parts
        ]
        return Decoded(parts, name=name), pixels
