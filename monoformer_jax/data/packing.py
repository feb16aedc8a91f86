"""Packing of complete documents into rows: first-fit, with several rows open at a time."""

from __future__ import annotations

import functools

import grain
import numpy as np

from monoformer_jax.batch import FIELDS, Document, shift
from monoformer_jax.config import TokenLayout
from monoformer_jax.errors import InputError, require

_PROBE = 1000  # raise an error if the first so many documents are all too long


class LengthFilter:
    """Filter that keeps documents that fit in a row, and counts the dropped ones."""

    def __init__(self, length: int):
        self.length, self.kept, self.dropped = length, 0, 0

    def __call__(self, document: Document) -> bool:
        fits = len(document["tokens"]) <= self.length
        self.kept += fits
        self.dropped += not fits
        if self.kept == 0 and self.dropped == _PROBE:
            raise InputError(
                f"none of the first {_PROBE} documents fits into data.max_seq_len={self.length} "
                f"tokens; the last has {len(document['tokens'])}"
            )
        return fits


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
