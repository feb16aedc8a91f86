"""Documents into rows: whole documents, first fit, several rows filled at a time."""

from __future__ import annotations

import functools

import grain
import numpy as np

from monoformer_jax.batch import number_images
from monoformer_jax.config import Config
from monoformer_jax.data.documents import Document
from monoformer_jax.errors import InputError, require

_STREAMS = (
    "tokens",
    "token_types",
    "denoise",
    "patches",
    "patch_logvar",
    "patch_positions",
    "features",
    "targets",
    "target_weights",
)
_PROBE = 1000  # documents that may all be too long before it is called an error


class LengthFilter:
    """Filter for documents that fit a row; counts the ones it drops."""

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


def pack(documents: grain.IterDataset, config: Config, pad_id: int) -> grain.IterDataset:
    """Rows of the batch contract, without the batch axis.

    `data.packing_bins` rows are filled at the same time; a document goes to the first that has room.

    Raises:
      InputError: with the row, if more images than the model counts came together in one.
    """
    rows = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=dict.fromkeys(_STREAMS, config.data.max_seq_len),
        num_packing_bins=config.data.packing_bins,
        seed=config.seed,
        meta_features=_STREAMS[1:],  # packed and padded like tokens, which give the segments
        padding_struct=dict.fromkeys(_STREAMS, 0) | {"tokens": pad_id, "targets": pad_id},
    )
    return rows.map(functools.partial(_finish, config=config))


def _finish(row: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    row = dict(row)
    row["segment_ids"] = row.pop("tokens_segment_ids").astype(np.int32)
    row["positions"] = row.pop("tokens_positions").astype(np.int32)
    row["image_ids"] = number_images(row["token_types"])
    images = row["image_ids"].max()
    require(
        images <= config.max_images,
        f"{images} images came into one row, but data.max_seq_len={config.data.max_seq_len} and "
        f"data.image_size={config.data.image_size} make room for {config.max_images}: image_size "
        "must be that of the smallest image",
    )
    return row
