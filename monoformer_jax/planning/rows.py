"""What a row of a batch holds: what the useful work of a step and its attention mask are counted on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from monoformer_jax.attention import IntervalMask, mask_area, row_masks
from monoformer_jax.batch import PAD, PATCH, TEXT, TIME, Batch
from monoformer_jax.models import get_model

PROMPT = 16  # tokens of the prompt of an image where the data is not known
TRAINING = 3  # forward plus backward in forward passes; remat is not model FLOPs


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows, [n, L] each.

    Args:
      token_types, masks: of the tokens, see `batch.FIELDS` and `attention.mask.row_masks`.
      images: mean number of images of a row.
      text: bool, whether the token has a text target.
      assumed: whether the rows are not of the data, see `assumed_rows`.
    """

    token_types: np.ndarray
    masks: tuple[IntervalMask, ...]
    images: float
    text: np.ndarray
    assumed: bool

    @property
    def real_token_share(self) -> float:
        return float((self.token_types != PAD).mean())

    def flops(self, c: Any, batch_size: int) -> float:
        """Useful model FLOPs of a step: real tokens, visible pairs and text targets; no remat.

        Args:
          c: config of the model.
          batch_size: rows of a step.
        """
        rows = batch_size / len(self.token_types)
        forward = get_model(c).flops(
            c,
            tokens=int((self.token_types != PAD).sum()),
            pairs=int(np.asarray(mask_area(self.masks)).sum()),
            patches=int((self.token_types == PATCH).sum()),
            text=int(self.text.sum()),
        )
        return TRAINING * forward * rows


def rows_of(batches: list[Batch]) -> Rows:
    """The rows of batches of the data."""
    return _rows({name: np.concatenate([b[name] for b in batches]) for name in batches[0]}, False)


def _rows(fields: Batch, assumed: bool) -> Rows:
    masks = tuple(IntervalMask(np.asarray(m.start), np.asarray(m.stop)) for m in row_masks(fields))
    images = float(fields["image_ids"].max(-1).mean())
    return Rows(fields["token_types"], masks, images, fields["target_weights"] > 0, assumed)


def assumed_rows(length: int, image: int, times: int) -> Rows:
    """A row of as many documents as fit, each a prompt of `PROMPT` tokens and an image; the prompt is
    as long as fits if no document does.

    Args:
      length: tokens of a row.
      image: tokens of an image, `times` of which are TIME tokens.
    """
    prompt = min(PROMPT, length - image - 4)  # <s>, <|im_start|>, <|im_end|>, </s>
    kinds = ((prompt + 2, TEXT), (times, TIME), (image - times, PATCH), (2, TEXT))
    document = np.concatenate([np.full(count, kind) for count, kind in kinds])
    count = length // len(document)
    numbers = np.arange(1, count + 1)

    def row(documents):
        flat = np.concatenate(documents)
        return np.pad(flat, (0, length - len(flat))).astype(np.int32)[None]

    is_image = document != TEXT
    token_types = row([document] * count)
    fields = {
        "token_types": token_types,
        "segment_ids": row([np.full(len(document), n) for n in numbers]),
        "image_ids": row([n * is_image for n in numbers]),
        "prefix_stop": np.zeros((1, length, 0), np.int32),
        "target_weights": token_types == TEXT,
    }
    return _rows(fields, True)
