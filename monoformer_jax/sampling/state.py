"""Decoding state of a batch of sequences: the model's state, and the set of tokens in each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from monoformer_jax.batch import TEXT, Document, stack
from monoformer_jax.errors import require
from monoformer_jax.models import get_model
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import constrain, spread_batch
from monoformer_jax.sampling.prompts import SLOTS, bucket
from monoformer_jax.sampling.sampler import Sampler


@flax.struct.dataclass
class Sequences:
    """Decoding state of B sequences."""

    state: Any  # the model's state, see `models.MODELS`
    # bool [B, V], tokens that occur in the sequence, for the repetition penalty; V is 0 without text.
    seen: jax.Array


def init_sequences(c: Any, params: dict, rows: int) -> Sequences:
    """Returns the state of empty sequences.

    Args:
      c: config of the model.
    """
    head = get_model(c).text_head(c, params)
    seen = jnp.zeros((rows, 0 if head is None else head.shape[1]), bool)
    return Sequences(get_model(c).init_state(c, rows), seen)


@functools.partial(jax.jit, static_argnames=("c", "slots"))
def extend(
    params: dict, sequences: Sequences, block: dict[str, jax.Array], c: Any, slots: int
) -> Sequences:
    """Appends a block of the batch contract [B, L] to the sequences, see `extend` of a model."""
    with full_precision(c.dtype):
        state = get_model(c).extend(c, params, sequences.state, block, slots)
    state = constrain(state, state.logical_axes())
    is_text = block["token_types"] == TEXT
    return Sequences(state, mark_seen(sequences.seen, block["tokens"], is_text))


@functools.partial(jax.jit, static_argnames="slots")
def truncate(
    sequences: Sequences, lengths: jax.Array, tokens: jax.Array, kept: jax.Array, slots: int
) -> Sequences:
    """Truncates sequence b to lengths[b] tokens; marks the first kept[b] of tokens [B, L] as seen."""
    real = jnp.arange(tokens.shape[1]) < kept[:, None]
    seen = mark_seen(sequences.seen, tokens, real)
    return Sequences(sequences.state.truncate(lengths, slots), seen)


def mark_seen(seen: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Adds the tokens [B, L] where `real` is set to `seen`."""
    tokens = jnp.where(real, tokens, seen.shape[1])
    return seen.at[jnp.arange(len(seen))[:, None], tokens].set(True, mode="drop")


@functools.partial(jax.jit, static_argnames=("slots",))
def stack_branches(states: Sequence[Any], index: jax.Array, slots: int) -> Any:
    """Interleaves sequence index[b] of the first state with sequence b of the others: [B · states]."""
    first, *others = states
    state = type(first).weave([first.take(index), *others], slots)
    return constrain(state, state.logical_axes())


def prefill(sampler: Sampler, documents: Sequence[Document], least: int = SLOTS) -> Sequences:
    """Returns the decoding state after documents; the batch is sharded over the mesh if there is one.

    Args:
      least: minimum number of cache slots.

    Raises:
      InputError: `documents` is empty.
    """
    require(len(documents) > 0, "there is no prompt: give at least one")
    c, params = sampler.config.model, sampler.params
    length = bucket(max(len(document["tokens"]) for document in documents))
    block = shard_batch(stack(documents, length, sampler.tokenizer.pad_id), sampler.mesh)
    return extend(params, init_sequences(c, params, len(documents)), block, c, max(length, least))


def shard_batch(tree, mesh: Mesh | None):
    """Shards arrays [B, …], the same in every process, over the mesh; without one returns them."""
    return tree if mesh is None else spread_batch(tree, mesh)
