"""Packing of complete documents into rows: first-fit, with several rows open at a time."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from monoformer_jax.batch import FIELDS, Document, shift
from monoformer_jax.config import TokenLayout
from monoformer_jax.errors import require

_WINDOW = 1000  # examples of a stream in which the unusable ones are counted


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Stands in a stream of documents for an example that cannot be used.

    Attributes:
      reason: a reason of `BadExample`.
      name: which example.
      message: what is wrong with it.
    """

    reason: str
    name: str
    message: str


class UsableDocuments(grain.IterDataset):
    """The documents that fit in a row; counts the others by reason, "too_long" among them.

    The counts are part of the state of an iterator, so that a resumed run continues them.

    Attributes:
      counts: {"kept" or a reason: number of examples} of the iterator that was used last.
      skipped: the examples that it skipped since this list was cleared, without the documents that are
        too long.
    """

    def __init__(self, documents: grain.IterDataset, length: int, max_bad_fraction: float):
        super().__init__(documents)
        self.length, self.max_bad_fraction = length, max_bad_fraction
        self.counts: dict[str, int] = {}
        self.skipped: list[Skipped] = []

    def __iter__(self) -> grain.DatasetIterator:
        return _UsableIterator(iter(self._parent), self)


class _UsableIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.DatasetIterator, dataset: UsableDocuments):
        super().__init__(documents)
        self._dataset = dataset
        self._counts: collections.Counter[str] = collections.Counter()
        self._seen, self._bad = 0, 0  # in the current window

    def __next__(self) -> Document:
        while True:
            document = next(self._parent)
            reason = self._reason(document)
            self._counts[reason] += 1
            self._dataset.counts = self._counts
            if reason == "kept":
                return document
            if reason == "too_long":
                self._check_lengths(document)

    def _reason(self, document: Document | Skipped) -> str:
        bad = isinstance(document, Skipped)
        if self._seen == _WINDOW:
            self._seen, self._bad = 0, 0
        self._seen, self._bad = self._seen + 1, self._bad + bad
        if not bad:
            return "kept" if len(document["tokens"]) <= self._dataset.length else "too_long"
        self._dataset.skipped.append(document)
        most = self._dataset.max_bad_fraction
        require(
            self._bad <= most * _WINDOW,
            f"more than data.max_bad_fraction={most:g} of {_WINDOW} examples cannot be used; the last "
            f"is {document.name}: {document.message}",
        )
        return document.reason

    def _check_lengths(self, document: Document) -> None:
        none = self._counts["kept"] == 0 and self._counts["too_long"] == _WINDOW
        require(
            not none,
            f"none of the first {_WINDOW} documents fits into data.max_seq_len={self._dataset.length} "
            f"tokens; the last has {len(document['tokens'])}",
        )

    def get_state(self) -> dict[str, Any]:
        state = {"counts": dict(self._counts), "window": [self._seen, self._bad]}
        return state | {"documents": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        # Checkpoints of before December 2026 hold the state of the documents alone.
        self._parent.set_state(state.get("documents", state))
        self._counts = collections.Counter(state.get("counts", {}))
        self._seen, self._bad = state.get("window", (0, 0))


def pack(
    documents: grain.IterDataset,
    layout: TokenLayout,
    *,
    rows: int,
    length: int,
    bins: int,
    pad_id: int,
    max_images: int,
    seed: int = 0,
) -> grain.IterDataset:
    """Packs documents into batches [rows, length, …] of the batch contract.

    Args:
      layout: token layout of the model.
      rows: rows per batch.
      length: tokens per row.
      bins: number of open rows; a document is added to the first one with space.
      max_images: maximum number of images per row.

    Raises:
      InputError: when iterated, if a row has more images.
    """
    # grain spends most of its time on fields, not on their bytes: two arrays instead of twelve.
    columns = _columns(layout)
    padding = {name: pad_id if field.pad is None else field.pad for name, field in FIELDS.items()}
    packed = grain.experimental.FirstFitPackIterDataset(
        documents.map(functools.partial(_join, columns=columns)),
        length_struct=dict.fromkeys(columns, length),
        num_packing_bins=bins,
        seed=seed,
        meta_features=["float32"],  # packed alike; segment ids are derived from the integers only
        padding_struct={
            kind: np.concatenate([np.full(width, padding[name]) for name, width in widths.items()])
            for kind, widths in columns.items()
        },
    )
    finish = functools.partial(_split, columns=columns, max_images=max_images)
    return packed.batch(rows).map(finish)


def _columns(layout: TokenLayout) -> dict[str, dict[str, int]]:
    """The fields of each of the two arrays that are packed, with their widths."""
    columns: dict[str, dict[str, int]] = {"int32": {}, "float32": {}}
    for name, field in FIELDS.items():
        kind = "float32" if field.dtype == np.float32 else "int32"
        columns[kind][name] = 1 if field.width is None else field.width(layout)
    return columns


def _join(document: Document, columns: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    """Document -> {"int32": [n, columns], "float32": [n, columns]}."""
    joined, length = {}, len(document["tokens"])
    for kind, widths in columns.items():
        joined[kind] = np.empty((length, sum(widths.values())), kind)
        start = 0
        for name, width in widths.items():
            joined[kind][:, start : start + width] = document[name].reshape(length, width)
            start += width
    return joined


def _split(
    packed: dict[str, np.ndarray], columns: dict[str, dict[str, int]], max_images: int
) -> dict[str, np.ndarray]:
    """Inverse of `_join` for a batch, with the values of each row shifted."""
    batch = {}
    for kind, widths in columns.items():
        start = 0
        for name, width in widths.items():
            values = packed[kind][..., start : start + width]
            values = values[..., 0] if FIELDS[name].width is None else values
            batch[name] = values.astype(FIELDS[name].dtype)
            start += width
    batch = {name: batch[name] for name in FIELDS}
    for number, segments in enumerate(packed["int32_segment_ids"]):
        shift({name: values[number] for name, values in batch.items()}, segments)
    images = batch["image_ids"].max()
    require(
        images <= max_images,
        f"{images} images are packed in one row, but data.max_seq_len={batch['tokens'].shape[1]} and "
        f"data.image_size allow {max_images}: image_size must be that of the smallest image",
    )
    return batch
