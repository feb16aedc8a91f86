"""The batch contract: one table of the fields that `data/` produces and `models/` consumes.

A row is a packed sequence of L tokens of four types, from several documents. Every field has one
entry per token, so shapes are static, and there are no ragged arrays and no loops over rows. A document
has the same fields for its n tokens, [n, …] instead of [B, L, …]; packing concatenates documents and
adds an offset to a field according to its `shift`. `FIELDS` is the only definition: code that creates,
pads, packs, stacks or slices fields is derived from it.

Axis legend of the library: B batch, L tokens, S keys, D embed, N query heads, K key/value heads,
H head dim, F mlp (or features of a vision encoder), V vocabulary, P patch values, C channels,
I images in a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from monoformer_jax.config import TokenLayout
from monoformer_jax.errors import require

PAD, TEXT, TIME, PATCH = range(4)

Batch = Mapping[str, "np.ndarray | jax.Array"]
Document = dict[str, np.ndarray]  # the fields of one document, [n, …]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a batch.

    Attributes:
      meaning: description in one line.
      dtype: dtype of the values.
      width: size of the last axis, from the layout; None if the shape is [B, L].
      shift: offset that packing adds to the values of a document: none (""), or the number of documents
        ("documents"), images ("images") or tokens ("tokens") before it in the row. With "images", 0
        means no image and stays 0.
      pad: value at PAD; None: the tokenizer's pad id.
    """

    meaning: str
    dtype: type
    width: Callable[[TokenLayout], int] | None = None
    shift: str = ""
    pad: int | None = 0


FIELDS: dict[str, Field] = {
    "tokens": Field("token id at TEXT, <image> at TIME and PATCH", np.int32, pad=None),
    "token_types": Field("PAD 0, TEXT 1, TIME 2, PATCH 3", np.int32),
    "segment_ids": Field("index of the document in the row, from 1", np.int32, shift="documents"),
    "positions": Field("RoPE position inside the document", np.int32),
    "image_ids": Field(
        "index of the image in the row, from 1, at its TIME and PATCH; else 0", np.int32,
        shift="images",
    ),
    "denoise": Field("TIME and PATCH of an image that is noised and has the image loss", np.bool_),
    "patches": Field(
        "clean values at PATCH, in the order (C, ph, pw)", np.float32, lambda c: c.patch_dim
    ),
    "patch_logvar": Field(
        "log-variance of latents, sampled at every step if data.sample_latents is set",
        np.float32, lambda c: c.patch_dim if c.latent_variance else 0,
    ),
    "patch_positions": Field("row and column of the patch in its image", np.int32, lambda c: 2),
    "prefix_stop": Field(
        "end of the tokens before its image that a noised copy sees; else the start of the document",
        np.int32, lambda c: 1 if c.noised_copies else 0, shift="tokens",
    ),
    "features": Field(
        "vision encoder features, at PATCH of conditioning images", np.float32, lambda c: c.feature_dim
    ),
    "targets": Field("the token that this position must predict", np.int32, pad=None),
    "target_weights": Field("weight of the target in the text loss; 0: no target", np.float32),
}  # fmt: skip


def spec(layout: TokenLayout, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every field of a batch [rows, length, …]."""
    return {
        name: jax.ShapeDtypeStruct(_shape(field, layout, (rows, length)), field.dtype)
        for name, field in FIELDS.items()
    }


def _shape(field: Field, layout: TokenLayout, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if field.width is None else (*shape, field.width(layout))


def empty(layout: TokenLayout, *shape: int, pad_id: int = 0, xp=np, **values) -> dict:
    """All fields of this shape with their pad values, except the given ones, which are broadcast.

    Args:
      xp: numpy, or jax.numpy inside jit.
    """
    if unknown := values.keys() - FIELDS.keys():
        raise ValueError(f"unknown batch fields: {', '.join(sorted(unknown))}")
    made = {}
    for name, field in FIELDS.items():
        value = values.get(name, pad_id if field.pad is None else field.pad)
        value = xp.asarray(value, field.dtype)
        made[name] = xp.broadcast_to(value, _shape(field, layout, shape))
    return made


def assemble(layout: TokenLayout, pieces: Sequence[Mapping], **values) -> Document:
    """Builds a document from consecutive pieces, each with "tokens" [n] and any other fields, of shape
    [n, …] or broadcast to it. The fields that a piece lacks have `values`, else pad values, or 0
    instead of the pad id."""
    length = sum(len(piece["tokens"]) for piece in pieces)
    document = {}
    for name, field in FIELDS.items():
        document[name] = np.zeros(_shape(field, layout, (length,)), field.dtype)
        if value := values.get(name, field.pad):
            document[name][:] = value
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + len(piece["tokens"])
        for name, value in piece.items():
            document[name][start:stop] = value
    return document


def concatenate(documents: Sequence[Document]) -> Document:
    """Concatenates pieces of one document."""
    return {name: np.concatenate([d[name] for d in documents]) for name in FIELDS}


def select(document: Document, where) -> Document:
    """Selects tokens by an index, a slice or a mask."""
    return {name: values[where] for name, values in document.items()}


def pad(document: Document, length: int, pad_id: int) -> Document:
    """Pads a document on the right to `length` tokens."""
    padded = {}
    for name, values in document.items():
        widths = [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1)
        fill = pad_id if FIELDS[name].pad is None else FIELDS[name].pad
        padded[name] = np.pad(values, widths, constant_values=fill)
    return padded


def stack(documents: Sequence[Document], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Stacks documents to a batch [B, length, …], padded on the right."""
    rows = [pad(document, length, pad_id) for document in documents]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def place(row: Document, documents: Sequence[Document]) -> None:
    """Writes documents into a row of PAD, one after the other, their values shifted.

    Args:
      row: views of the fields of one row, which this function changes.
    """
    stop = images = 0
    for index, document in enumerate(documents):
        start, stop = stop, stop + len(document["tokens"])
        before = {"documents": index, "tokens": start, "images": images}
        for name, values in document.items():
            if offset := before.get(FIELDS[name].shift):
                shifted = values + np.asarray(offset, values.dtype)
                values = np.where(values > 0, shifted, 0) if name == "image_ids" else shifted
            row[name][start:stop] = values
        images += int(document["image_ids"].max())


def text_block(layout: TokenLayout, tokens: jax.Array, positions: jax.Array) -> dict:
    """Builds a block of text tokens inside jit; tokens and positions are int32 [B, L]."""
    return empty(layout, *tokens.shape, xp=jnp, tokens=tokens, token_types=TEXT, segment_ids=1,
                 positions=positions)  # fmt: skip


def image_block(layout: TokenLayout, grid: tuple[int, int], rows: int) -> dict:
    """Builds a block of one image to denoise per row inside jit; positions start at 0.

    Args:
      grid: height and width in patches.
    """
    first, patches = layout.time_tokens, grid[0] * grid[1]
    index = jnp.arange(first + patches)
    places = jnp.stack(jnp.divmod(jnp.arange(patches), grid[1]), -1)
    return empty(
        layout, rows, first + patches, xp=jnp, token_types=jnp.where(index < first, TIME, PATCH),
        segment_ids=1, positions=index, image_ids=1, denoise=True,
        patch_positions=jnp.pad(places, ((first, 0), (0, 0))),
    )  # fmt: skip


def check(
    batch: Batch, expected: Mapping[str, jax.ShapeDtypeStruct], max_images: int, vocab_size: int
) -> None:
    """Raises ValueError, naming the field, if a host batch violates the contract.

    Training checks only the first batch of a run.
    """
    if missing := sorted(expected.keys() ^ batch.keys()):
        raise ValueError(f"batch fields missing or unknown: {', '.join(missing)}")
    for name, want in expected.items():
        got = batch[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"batch field {name} is {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    for name in ("tokens", "targets"):
        for row, token in np.argwhere((batch[name] < 0) | (batch[name] >= vocab_size)):
            raise ValueError(
                f"batch row {row}, token {token}: {name} is {batch[name][row, token]}, but ids of this "
                f"vocabulary are 0 to {vocab_size - 1}"
            )
    token_types, segments, images = (
        batch[name] for name in ("token_types", "segment_ids", "image_ids")
    )
    in_image = (token_types == TIME) | (token_types == PATCH)
    rules = {
        "token_types: a value outside 0..3": (token_types < PAD) | (token_types > PATCH),
        "segment_ids: must be 0 exactly at PAD": (segments == 0) != (token_types == PAD),
        "image_ids: must be above 0 exactly at TIME and PATCH": (images > 0) != in_image,
        f"image_ids: more than {max_images} images in a row": images > max_images,
        "denoise: set outside an image": batch["denoise"] & ~in_image,
        "patches: values outside PATCH": (batch["patches"] != 0).any(-1) & (token_types != PATCH),
        "target_weights: set on PAD": (batch["target_weights"] != 0) & (token_types == PAD),
        "prefix_stop: after the token": (
            batch["prefix_stop"] > np.arange(token_types.shape[1])[:, None]
        ).any(-1),
    }
    for rule, broken in rules.items():
        if broken.any():
            row, token = np.argwhere(broken)[0]
            raise ValueError(f"batch row {row}, token {token}: {rule}")


def patchify(image: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits an image into patches in raster order.

    Args:
      image: float [height, width, C].
      patch: patch size.

    Returns:
      patches float32 [n, P] with values in the order (C, ph, pw), and patch_positions int32 [n, 2].

    Raises:
      InputError: a side is not divisible by `patch`.
    """
    height, width, channels = image.shape
    require(
        height % patch == width % patch == 0,
        f"an image of {height}×{width} cannot be split into patches of size {patch}",
    )
    # One gather: as einops' "(h p) (w q) c -> (h w) (c p q)", at a third of its time, for every image.
    order, positions = _patch_order(height // patch, width // patch, patch, channels)
    return image.reshape(-1)[order].astype(np.float32, copy=False), positions


@functools.lru_cache
def _patch_order(
    height: int, width: int, patch: int, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of an image of height × width patches: where in it the values of each patch are, and
    patch_positions."""
    values = np.arange(height * width * patch**2 * channels)
    split = values.reshape(height, patch, width, patch, channels).transpose(0, 2, 4, 1, 3)
    positions = np.stack(np.indices((height, width), np.int32), -1).reshape(-1, 2)
    positions.flags.writeable = False
    return split.reshape(height * width, -1), positions


def unpatchify(patches: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """Inverse of `patchify`: [..., n, P] -> [..., height, width, C]."""
    return rearrange(
        patches, "... (h w) (c p q) -> ... (h p) (w q) c", h=height // patch, w=width // patch,
        p=patch, q=patch,
    )  # fmt: skip
