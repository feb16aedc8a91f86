"""Decoding of a dataset's images in worker processes, for `prepare_data`."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from monoformer_jax.data.documents import Part, Prompt
from monoformer_jax.data.forms import RawImage
from monoformer_jax.data.image_io import crop
from monoformer_jax.data.pipeline import cores, init_worker
from monoformer_jax.errors import InputError

_CHUNK = 64  # examples that pass between processes together, which costs as much as for one
_CHUNK_BYTES = 1 << 24  # with large images, fewer
_SLOTS = 2  # chunks of a worker: one that it decodes, one that waits
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

    Raises:
      InputError: a worker process was ended from outside.
    """
    chunk = min(_CHUNK if workers else 1, max(_CHUNK_BYTES // (size * size * channels), 1))
    shape = (_SLOTS * (workers or cores()), chunk, size, size, channels)
    if workers:
        spawn = multiprocessing.get_context("spawn")
        memory = spawn.RawArray("B", math.prod(shape))
        start = examples, memory, shape
        pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, start)
        decode = _decode_in_worker
    else:
        memory = bytearray(math.prod(shape))
        pool = concurrent.futures.ThreadPoolExecutor(cores())
        decode = _Chunks(examples, memory, shape)
    slots = np.frombuffer(memory, np.uint8).reshape(shape)
    chunks = iter(range(0, len(examples), chunk))
    try:
        # A slot is used again when its images are copied; chunks are taken in order.
        running = collections.deque(
            (pool.submit(decode, begin, slot), slot)
            for slot, begin in zip(range(len(slots)), chunks)
        )
        while running:
            future, slot = running.popleft()
            decoded, rest = future.result()
            made, end = [], 0
            for one in decoded:
                begin, end = end, end + sum(isinstance(part, RawImage) for part in one.parts)
                # Small copies: fresh memory for a whole chunk takes as long as to copy it.
                pixels = slots[slot, begin:end].copy()
                if missing := end - begin - len(pixels):
                    pixels = np.concatenate([pixels, rest[:missing]])
                    del rest[:missing]
                made.append(dataclasses.replace(one, pixels=pixels))
            for begin in itertools.islice(chunks, 1):
                running.append((pool.submit(decode, begin, slot), slot))
            yield from made
    except BrokenProcessPool as error:
        raise InputError(
            "a process that decodes images was ended; if the memory is too small, use fewer (--workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Chunks:
    """Decodes chunks of examples into slots of memory that the caller reads and that are used again:
    to pickle arrays, or to make shared memory for each chunk, takes longer (docs/benchmarks.md)."""

    def __init__(self, examples: Sequence, memory, shape: Sequence[int]):
        """Args:
        memory: buffer of `shape`.
        shape: (slots, images of a slot, size, size, channels).
        """
        self._examples, self._size, self._channels = examples, shape[-2], shape[-1]
        self._slots = np.frombuffer(memory, np.uint8).reshape(shape)

    def __call__(self, begin: int, slot: int) -> tuple[list[Decoded], list[np.ndarray]]:
        """The examples from `begin` on without their pixels, and images beyond the slot."""
        out, decoded, count, rest = self._slots[slot], [], 0, []
        for example in self._examples[begin : begin + len(out)]:
            one, images = decode_example(example, self._size, self._channels)
            decoded.append(one)
            for image in images:
                if count < len(out):
                    out[count] = image
                    count += 1
                else:
                    rest.append(image)
        return decoded, rest


def _start_worker(*of_chunks) -> None:
    global _chunks
    init_worker()
    _chunks = _Chunks(*of_chunks)


def _decode_in_worker(begin: int, slot: int) -> tuple[list[Decoded], list[np.ndarray]]:
    return _chunks(begin, slot)


def decode_example(example, size: int, channels: int = 3) -> tuple[Decoded, list[np.ndarray]]:
    """Returns the example without its pixels, and its pixels, an array per image. An error is a
    value, so that one bad image costs one example."""
    name = ""
    try:
        raw = example()
        name = raw.name
        pixels = [
            crop(part.open(), size, channels) for part in raw.parts if isinstance(part, RawImage)
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
