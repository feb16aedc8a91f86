"""Documents that are to be continued, as one batch; rows end where they end and PAD follows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import TEXT, number_images
from monoformer_jax.config import Config, ModelConfig
from monoformer_jax.data.documents import Document, Image, Part, UntrainedText, build
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require

Parts = Sequence[Part]
_STREAMS = ("tokens", "token_types", "denoise", "patches", "patch_positions", "features")


def bucket(length: int, least: int = 64) -> int:
    """The power of two that a length is padded to, so that few lengths are ever compiled."""
    return max(least, 1 << max(int(length) - 1, 0).bit_length())


def encode_prompt(
    parts: Parts,
    tokenizer: Tokenizer,
    config: Config,
    *,
    room: int,
    closing: Sequence[int] = (),
    name: str = "the prompt",
) -> Document:
    """Streams of a document that is to be continued.

    Args:
      parts: texts, images and features; no parts is `<s>` alone.
      room: tokens that will follow it.
      closing: ids that end it, such as <|im_start|>.
      name: of the prompt in messages.

    Raises:
      InputError: an empty text, an image over the trained size, or no room in the context.
    """
    check_parts(parts, config, name)
    document = build(parts, tokenizer, config.model, closing=closing)
    length, context = len(document["tokens"]), config.data.max_seq_len
    require(
        length + room <= context,
        f"{name} has {length} tokens and {room} are to follow, but the model's context is {context} "
        "(data.max_seq_len): shorten it",
    )
    return document


def check_parts(parts: Parts, config: Config, name: str) -> None:
    """Raises InputError for an empty text, or an image larger than those of training."""
    texts = [getattr(part, "text", part) for part in parts if isinstance(part, str | UntrainedText)]
    require(all(texts), f"{name} is empty: write something to continue")
    for part in parts:
        if isinstance(part, Image):
            check_size(part.pixels.shape[:2], config, f"an image in {name}")


def check_size(size: tuple[int, int], config: Config, name: str) -> None:
    """Raises InputError for a height and width that no image of training had."""
    (height, width), most, patch = size, config.data.image_size, config.model.patch_size
    require(
        0 < height <= most and 0 < width <= most,
        f"{name} is {height}×{width}, but the model was trained up to {most}×{most} "
        "(data.image_size): make it smaller",
    )
    require(
        height % patch == 0 and width % patch == 0,
        f"{name} is {height}×{width}: both sides must be multiples of the patch of {patch}",
    )


def drop_text(document: Document, tokenizer: Tokenizer) -> Document:
    """What is left of a prompt without its words: <s>, its images, and the opened one."""
    kept = (tokenizer.bos_id, tokenizer.im_start_id, tokenizer.im_end_id)
    keep = (document["token_types"] != TEXT) | np.isin(document["tokens"], kept)
    return {name: stream[keep] for name, stream in document.items()}


def pad_batch(documents: Sequence[Document], slots: int, pad_id: int) -> dict[str, np.ndarray]:
    """Streams [B, slots] of documents or of pieces of them, PAD on the right.

    All their images are at the same noise level, 0, so they share the number 1.
    """
    rows = []
    for document in documents:
        n = len(document["tokens"])
        row = {}
        for name in _STREAMS:
            widths = [(0, slots - n)] + [(0, 0)] * (document[name].ndim - 1)
            fill = pad_id if name == "tokens" else 0
            row[name] = np.pad(document[name], widths, constant_values=fill)
        row["segment_ids"] = np.pad(np.ones(n, np.int32), (0, slots - n))
        row["image_ids"] = np.minimum(number_images(row["token_types"]), 1)
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def text_inputs(tokens: jax.Array, positions: jax.Array, c: ModelConfig) -> dict[str, jax.Array]:
    """Model inputs of plain text, tokens and positions int32 [B, L]."""
    shape = tokens.shape
    return {
        "tokens": tokens,
        "token_types": jnp.full(shape, TEXT, jnp.int32),
        "positions": positions,
        "image_ids": jnp.zeros(shape, jnp.int32),
        "denoise": jnp.zeros(shape, bool),
        "patches": jnp.zeros((*shape, c.patch_dim)),
        "features": jnp.zeros((*shape, c.feature_dim)),
        "patch_positions": jnp.zeros((*shape, 2), jnp.int32),
    }
