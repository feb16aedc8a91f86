"""Rows under way: each is a document of its own length, and their caches end at one slot.

    slot     0  1  2  3  4  5  6  7
    row 0    .  .  .  <s> a  c  a  t       length 5, start 3
    row 1    .  <s> h  e  l  l  o  !       length 7, start 1

So the next block goes to the same slots of every row, and a query sees one range of keys. A block may
be longer for one row than for another; what a row has not used is forgotten when the rows are aligned
again. Keys carry the positions of their documents, so moving them to other slots changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from monoformer_jax.attention import IntervalMask
from monoformer_jax.batch import PAD, TEXT
from monoformer_jax.config import ModelConfig
from monoformer_jax.data.documents import Document
from monoformer_jax.errors import require
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import attention_mask
from monoformer_jax.nn.decoder import KVCache
from monoformer_jax.parallel import BATCH
from monoformer_jax.sampling.prompts import bucket, pad_batch


@flax.struct.dataclass
class DecodeState:
    """The state of B rows, of which the last tokens stand in the last slot of the cache."""

    cache: KVCache
    lengths: jax.Array  # int32 [B], tokens of each row
    hidden: jax.Array  # [B, D], the last token's; what the next one is drawn from
    seen: jax.Array  # bool [B, V], the tokens that stand in the row

    @property
    def slots(self) -> int:
        return self.cache.k.shape[2]

    @property
    def starts(self) -> jax.Array:
        """int32 [B], the slot of each row's first token."""
        return self.slots - self.lengths


def init_decode_state(c: ModelConfig, batch: int) -> DecodeState:
    """B rows without a token."""
    return DecodeState(
        KVCache.create(c, batch, 0),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, c.embed_dim), c.dtype),
        jnp.zeros((batch, c.padded_vocab), bool),
    )


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The cache and empty slots after it, to which the next tokens go."""
    end = cache.k.shape[2]
    widths = ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0))
    return KVCache(jnp.pad(cache.k, widths), jnp.pad(cache.v, widths), jnp.int32(end))


def align_cache(cache: KVCache, ends: jax.Array, slots: int) -> KVCache:
    """A cache of `slots` slots in which row b, which ended before slot ends[b], ends at the last."""
    index = ends[:, None] - slots + jnp.arange(slots)
    # Slots before a row's first token get another's values, which no query of the row sees.
    index = jnp.clip(index, 0, cache.k.shape[2] - 1)[None, :, :, None, None]
    k, v = (jnp.take_along_axis(x, index, axis=2) for x in (cache.k, cache.v))
    return KVCache(k, v, jnp.int32(slots))


@functools.partial(jax.jit, static_argnames="slots")
def truncate(state: DecodeState, tokens: jax.Array, kept: jax.Array, slots: int) -> DecodeState:
    """Rows that keep the first kept[b] of the tokens [B, L] in the last L slots; less than 0 takes
    away from those before.

    `hidden` stays that of the last token that ran: a row that lost some goes on with `extend`.
    """
    cache = align_cache(state.cache, state.slots - tokens.shape[1] + kept, slots)
    real = jnp.arange(tokens.shape[1]) < kept[:, None]
    return DecodeState(cache, state.lengths + kept, state.hidden, _saw(state.seen, tokens, real))


def _saw(seen: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
    tokens = jnp.where(real, tokens, seen.shape[1])
    return seen.at[jnp.arange(len(seen))[:, None], tokens].set(True, mode="drop")


@functools.partial(jax.jit, static_argnames="slots")
def stack_branches(parts: list[DecodeState], index: list[jax.Array], slots: int) -> DecodeState:
    """Rows index[j] of parts[j], those of the first index together, and so on: [B * parts]."""

    def chosen(state, i):
        cache = align_cache(state.cache, jnp.full(len(state.lengths), state.slots), slots)
        layers = (x[:, i] for x in (cache.k, cache.v))
        return (*layers, state.lengths[i], state.hidden[i], state.seen[i])

    def woven(axis, arrays):
        stacked = jnp.stack(arrays, axis + 1)
        return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])

    k, v, *rest = zip(*(chosen(state, i) for state, i in zip(parts, index)))
    cache = KVCache(woven(1, k), woven(1, v), jnp.int32(slots))
    return DecodeState(cache, *(woven(0, x) for x in rest))


@functools.partial(jax.jit, static_argnames=("c", "slots"))
def extend(
    params: dict, state: DecodeState, block: dict[str, jax.Array], c: ModelConfig, slots: int
):
    """Runs a block of the batch contract [B, L] after the rows, and aligns them in `slots` slots.

    Its images are context: their noise level is 0. PAD stands on the right, and a row of nothing
    but PAD stays as it is.
    """
    batch, length = block["tokens"].shape
    mask = attention_mask(c, block)
    real = block["token_types"] != PAD
    stop = mask.stop + state.slots
    start = jnp.where(real, state.starts[:, None], stop)
    positions = state.lengths[:, None] + jnp.arange(length)
    cache = grow_cache(state.cache, length)
    hidden, cache = monoformer.bind(c, params)(
        block | {"positions": positions}, jnp.zeros((batch, 1)), IntervalMask(start, stop), cache
    )
    count = real.sum(1)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return DecodeState(
        align_cache(cache, state.slots + count, slots),
        state.lengths + count,
        jnp.where(count[:, None] > 0, last, state.hidden),
        _saw(state.seen, block["tokens"], block["token_types"] == TEXT),
    )


def prefill(
    params: dict, documents: Sequence[Document], pad_id: int, c: ModelConfig, mesh: Mesh | None
) -> DecodeState:
    """Runs whole documents once, cut over the mesh if there is one.

    Raises:
      InputError: there are none.
    """
    require(len(documents) > 0, "there is no prompt: give at least one")
    slots = bucket(max(len(document["tokens"]) for document in documents))
    block = shard_batch(pad_batch(documents, slots, pad_id), mesh)
    return extend(params, init_decode_state(c, len(documents)), block, c, slots)


def shard_batch(tree, mesh: Mesh | None):
    """Arrays [B, …] cut over data and fsdp; without a mesh they go where jax puts them."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, BATCH))
