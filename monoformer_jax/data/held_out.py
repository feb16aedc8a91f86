"""Held-out examples: the share of every source that is never trained, and the rows that measure it.

Whether an example is held out depends on its content alone: on its first image, or on its text if it
has none. So the split is the same on every host, stays when data is added or sources are mixed anew,
and examples that share an image, such as one with two captions, are on the same side of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from monoformer_jax import batch as contract
from monoformer_jax.batch import Document
from monoformer_jax.config import DataConfig, TokenLayout
from monoformer_jax.data.documents import (
    EndOfTurn,
    Features,
    Image,
    Part,
    Prompt,
    UntrainedText,
    build_document,
    draw_prompts,
)
from monoformer_jax.data.packing import Pack, SplitToRows
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import BadExample, InputError, require

_PROBE = 1000  # examples among which one must be left for training


def is_trained(example: Any, split: float) -> bool:
    """Whether an example is on the trained side of `data.validation_split`."""
    digest = hashlib.blake2b(_key(example), digest_size=8).digest()
    return int.from_bytes(digest, "big") >= split * 2**64


def _key(example: Any) -> bytes:
    """The bytes of an example's first image, or of its texts and numbers if it has none."""
    words = []
    for value in _values(example):
        if isinstance(value, np.ndarray):
            return repr(value.shape).encode() + np.ascontiguousarray(value, "<f4").tobytes()
        words.append(value)
    return "\0".join(words).encode("utf-8", "surrogatepass")


def _values(example: Any) -> Iterator[np.ndarray | str]:
    """The images and texts of an example of any source, in order."""
    match example:
        case Image():
            yield example.pixels
        case Features():
            yield example.values
        case np.ndarray() if example.ndim:
            yield example
        case Prompt():
            yield from example.texts
        case UntrainedText():
            yield example.text
        case str():
            yield example
        case EndOfTurn() | None:
            return
        case int() | float() | bytes() | np.generic():
            yield repr(example)
        case Mapping():
            yield from _values(list(example.values()))
        case Sequence():
            yield from itertools.chain.from_iterable(map(_values, example))
        case _:
            raise InputError(
                f"data.validation_split: an example of type {type(example).__name__} has no image or "
                "text to be hashed; give a folder with data.validation_records"
            )


def trained_examples(c: DataConfig, name: str, examples: grain.MapDataset) -> grain.MapDataset:
    """The (number, example) of a source without those that are held out; bad ones stay."""
    if not c.validation_split or name in c.validation_records:
        return examples
    return examples.filter(functools.partial(_stays, split=c.validation_split))


def _stays(numbered: tuple[int, Any], split: float) -> bool:
    example = numbered[1]
    return isinstance(example, Exception) or is_trained(example, split)


def read_examples(examples: Sequence, numbers: Iterable[int]) -> Iterator[Any]:
    """Yields the examples of these numbers, without those that cannot be read."""
    for number in numbers:
        with contextlib.suppress(BadExample, OSError):
            yield examples[int(number)]


def check_split(c: DataConfig, sources: Mapping[str, Source]) -> None:
    """Raises InputError if the split leaves nothing of a source to train."""
    for name, source in sources.items() if c.validation_split else ():
        if name not in c.validation_records:
            some = read_examples(source.examples, range(min(len(source.examples), _PROBE)))
            require(
                any(is_trained(example, c.validation_split) for example in some),
                f"data.validation_split={c.validation_split} leaves no example of {name} to train",
            )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out examples of a run, the same in every process.

    Attributes:
      examples: source -> its examples, as parts.
      rows: the rows that they are packed into, [L, …] of `batch.FIELDS`.
    """

    examples: dict[str, list[list[Part]]]
    rows: list[Document]


def open_held_out(
    c: DataConfig,
    layout: TokenLayout,
    tokenizer: Tokenizer,
    *,
    rows: int,
    max_images: int,
    text_beside_images: bool,
) -> HeldOut:
    """Reads the held-out examples of every source, in a fixed order, and packs them.

    Prompts are never dropped, and one wording is drawn. A source has a share of the rows by its weight
    in data.mixture; its examples are read until they are filled, each once.

    Args:
      rows: number of rows, at most.
      max_images: maximum number of images in a row.

    Raises:
      InputError: nothing is held out, or see `open_sources`.
    """
    weights = {name: weight for name, weight in c.mixture.items() if weight > 0}
    total, examples, documents = sum(weights.values()), {}, []
    to_rows = SplitToRows(c.max_seq_len, tokenizer, c.max_images)
    for name, source in _held_out_sources(c, layout.channels).items():
        tokens = rows * c.max_seq_len * weights[name] / total
        examples[name] = []
        whole = name in c.validation_records
        for parts, document in build_documents(
            c, source, tokenizer, layout, text_beside_images=text_beside_images,
            keep=lambda x, whole=whole: whole or not is_trained(x, c.validation_split),
        ):  # fmt: skip
            pieces = to_rows.flat_map(document)
            if not pieces:
                continue
            examples[name].append(parts)
            documents += pieces
            tokens -= sum(len(piece["tokens"]) for piece in pieces)
            if tokens <= 0:
                break
    require(
        bool(documents),
        f"data.validation_split={c.validation_split} holds out none of the examples: raise it, or give "
        "a folder with data.validation_records",
    )
    packed = Pack(
        grain.MapDataset.source(documents).to_iter_dataset(), layout, rows=1, length=c.max_seq_len,
        buffer=c.packing_buffer, pad_id=tokenizer.pad_id, max_images=max_images,
    )  # fmt: skip
    made = [contract.select(row, 0) for row in itertools.islice(packed, rows)]
    return HeldOut(examples, made)


def _held_out_sources(c: DataConfig, channels: int) -> dict[str, Source]:
    """The sources that have held-out examples; those of a folder of their own hold out all of it."""
    mixture = {
        name: weight
        for name, weight in c.mixture.items()
        if c.validation_split or name in c.validation_records
    }
    given = dataclasses.replace(
        c, mixture=mixture, records={**c.records, **c.validation_records}, validation_records={}
    )
    return open_sources(given, channels)


def build_documents(
    c: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    layout: TokenLayout,
    *,
    text_beside_images: bool,
    keep: Callable[[Any], bool],
) -> Iterator[tuple[list[Part], Document]]:
    """Yields the examples of a source for which `keep` holds, as parts and as documents of any length.

    They come once, in a fixed order, with one wording of each prompt and none dropped.
    """
    order = np.random.default_rng(0).permutation(len(source.examples))
    for number, example in enumerate(read_examples(source.examples, order)):
        if not keep(example):
            continue
        rng = np.random.default_rng(number)
        try:
            parts = draw_prompts(source.to_parts(example, rng), rng, 0.0, c.end_of_prompt)
        except (BadExample, OSError):  # training skips and counts it
            continue
        document = build_document(
            parts, tokenizer, layout, text_beside_images=text_beside_images,
            noised_copies=c.noised_copies,
        )  # fmt: skip
        yield parts, document


def stack_rows(rows: Sequence[Document], layout: TokenLayout, size: int, pad_id: int) -> list[dict]:
    """Batches [size, L, …] of the rows, the last one filled up with PAD."""
    length = len(rows[0]["tokens"])
    padding = contract.empty(layout, length, pad_id=pad_id)
    filled = [*rows, *[padding] * (-len(rows) % size)]
    return [
        contract.stack(filled[i : i + size], length, pad_id) for i in range(0, len(filled), size)
    ]
