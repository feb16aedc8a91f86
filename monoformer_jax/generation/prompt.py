"""Prompts of different lengths as one batch, and their one pass through the model."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import TEXT, number_images
from monoformer_jax.config import Config, ModelConfig, require
from monoformer_jax.data.documents import Document, Part, build
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.models.monoformer import MonoFormer, attention_mask
from monoformer_jax.nn.decoder import KVCache

Parts = Sequence[Part]
_STREAMS = ("tokens", "kinds", "denoise", "patches", "grid", "features")
_BUCKET = 16  # prompt lengths are rounded up to this, so that few of them are compiled


def stack_prompts(
    prompts: Sequence[Parts],
    tokenizer: Tokenizer,
    config: Config,
    *,
    room: int,
    closing: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Streams [B, T] of prompts padded on the LEFT, so that all of them end at the same slot.

    Args:
      prompts: parts of a document that is to be continued; no parts is the empty prompt `<s>`.
      tokenizer, config: of the model.
      room: tokens that will be generated after the prompt.
      closing: ids that end every prompt, such as <|im_start|>.

    Raises:
      InputError: an empty text, or a prompt that leaves no room in the model's context.
    """
    documents = []
    for number, parts in enumerate(prompts, 1):
        require(all(part for part in parts if isinstance(part, str)), f"prompt {number} is empty")
        document = build(parts, tokenizer, config.model, closing=closing)
        length, context = len(document["tokens"]), config.data.row_length
        require(
            length + room <= context,
            f"prompt {number} has {length} tokens and {room} are to follow, but the model's context "
            f"is {context} (data.row_length)",
        )
        documents.append(document)
    longest = max(len(document["tokens"]) for document in documents)
    slots = -(-longest // _BUCKET) * _BUCKET
    padded = [_left_pad(document, slots, tokenizer.pad_id) for document in documents]
    return {name: np.stack([row[name] for row in padded]) for name in padded[0]}


def _left_pad(document: Document, slots: int, pad_id: int) -> dict[str, np.ndarray]:
    n = len(document["tokens"])
    row = {}
    for name in _STREAMS:
        widths = [(slots - n, 0)] + [(0, 0)] * (document[name].ndim - 1)
        fill = pad_id if name == "tokens" else 0
        row[name] = np.pad(document[name], widths, constant_values=fill)
    row["segment_ids"] = np.pad(np.ones(n, np.int32), (slots - n, 0))
    row["positions"] = np.pad(np.arange(n, dtype=np.int32), (slots - n, 0))
    row["image_ids"] = number_images(row["kinds"])
    return row


def prefill(
    model: MonoFormer, streams: dict[str, jax.Array], slots: int, max_images: int
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Runs the prompts once; their images are context, so their noise level is 0.

    Returns:
      Hidden state [B, D] of the last token, the cache with room for `slots` tokens, and the first
      slot [B] of every prompt.
    """
    batch, length = streams["tokens"].shape
    mask = attention_mask(model.config, streams)
    cache = KVCache.create(model.config, batch, slots)
    times = jnp.zeros((batch, max_images))
    hidden, cache = model(streams, times, mask, cache)
    return hidden[:, -1], cache, length - streams["segment_ids"].sum(1)


def text_inputs(tokens: jax.Array, positions: jax.Array, c: ModelConfig) -> dict[str, jax.Array]:
    """Model inputs of plain text, tokens and positions int32 [B, L]."""
    shape = tokens.shape
    return {
        "tokens": tokens,
        "kinds": jnp.full(shape, TEXT, jnp.int32),
        "positions": positions,
        "image_ids": jnp.zeros(shape, jnp.int32),
        "denoise": jnp.zeros(shape, bool),
        "patches": jnp.zeros((*shape, c.patch_dim)),
        "features": jnp.zeros((*shape, c.feature_dim)),
        "grid": jnp.zeros((*shape, 2), jnp.int32),
    }
