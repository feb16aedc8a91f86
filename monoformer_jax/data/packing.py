"""Packing of complete documents into rows: first-fit, with several rows open at a time."""

from __future__ import annotations

import functools

import grain
import numpy as np

from monoformer_jax.batch import FIELDS, Document, shift
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
    *,
    length: int,
    bins: int,
    pad_id: int,
    max_images: int,
    seed: int = 0,
) -> grain.IterDataset:
    """Packs documents into rows of the batch contract, without the batch axis.

    Args:
      length: tokens per row.
      bins: number of open rows; a document is added to the first one with space.
      max_images: maximum number of images per row.

    Raises:
      InputError: when iterated, if a row has more images.
    """
    padding = {name: pad_id if field.pad is None else field.pad for name, field in FIELDS.items()}
    rows = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=dict.fromkeys(FIELDS, length),
        num_packing_bins=bins,
        seed=seed,
        # Packed and padded like tokens; segment ids are derived from tokens only.
        meta_features=[name for name in FIELDS if name != "tokens"],
        padding_struct=padding,
    )
    return rows.map(functools.partial(_finish, max_images=max_images))


def _finish(row: dict[str, np.ndarray], max_images: int) -> dict[str, np.ndarray]:
    row = shift({name: row[name] for name in FIELDS}, row["tokens_segment_ids"])
    images = row["image_ids"].max()
    require(
        images <= max_images,
        f"{images} images are packed in one row, but data.max_seq_len={len(row['tokens'])} and "
        f"data.image_size allow {max_images}: image_size must be that of the smallest image",
    )
    return row
