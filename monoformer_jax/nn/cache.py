"""Key/value caches, and the decoding state of a batch of sequences.

    slot     0  1  2  3  4  5  6  7
    row 0    .  .  .  <s> a  c  a  t       length 5, start 3
    row 1    .  <s> h  e  l  l  o  !       length 7, start 1

Sequences are right-aligned, so their next tokens are written to the same slots, and a query attends to
one range of keys. RoPE is applied to keys before caching: moving them to other slots does not change
the attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from monoformer_jax.nn.config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer; the caller's mask determines which slots are attended to."""

    k: jax.Array  # [layers, B, S, K, H]
    v: jax.Array  # [layers, B, S, K, H]
    index: jax.Array  # int32 [], the slot that the next token is written to

    @classmethod
    def create(cls, c: DecoderConfig, batch_size: int, slots: int) -> KVCache:
        """Returns a zero cache with index 0."""
        shape = (c.num_layers, batch_size, slots, c.num_kv_heads, c.head_dim)
        return cls(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), jnp.zeros((), jnp.int32))


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """Appends empty slots to the cache."""
    widths = ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0))
    return KVCache(jnp.pad(cache.k, widths), jnp.pad(cache.v, widths), cache.index)


def align_cache(cache: KVCache, ends: jax.Array, slots: int) -> KVCache:
    """Moves row b, which ends before slot ends[b], to the end of a cache of `slots` slots."""
    index = ends[:, None] - slots + jnp.arange(slots)
    # Slots before a row's first token get arbitrary values, which are masked out.
    index = jnp.clip(index, 0, cache.k.shape[2] - 1)[None, :, :, None, None]
    k, v = (jnp.take_along_axis(x, index, axis=2) for x in (cache.k, cache.v))
    return KVCache(k, v, jnp.int32(slots))


@flax.struct.dataclass
class DecodeState:
    """Decoding state of B sequences, whose last tokens are in slot `cache.index` - 1."""

    cache: KVCache
    lengths: jax.Array  # int32 [B], tokens of each sequence
    hidden: jax.Array  # [B, D], hidden state of the last token, input of the text head

    @staticmethod
    def logical_axes() -> DecodeState:
        """Logical axis names of the arrays, see `parallel.RULES`."""
        kv = ("layers", "batch", None, "kv_heads", "head_dim")
        return DecodeState(KVCache(kv, kv, ()), ("batch",), ("batch", None))

    @property
    def starts(self) -> jax.Array:
        """int32 [B], the slot of each sequence's first token."""
        return self.cache.index - self.lengths

    def take(self, rows: jax.Array) -> DecodeState:
        """Selects sequences by index, int32 [N]."""
        cache = KVCache(self.cache.k[:, rows], self.cache.v[:, rows], self.cache.index)
        return DecodeState(cache, self.lengths[rows], self.hidden[rows])

    def with_room(self, tokens: int) -> DecodeState:
        """Adds cache slots for so many more tokens."""
        return self.replace(cache=grow_cache(self.cache, tokens))

    def truncate(self, lengths: jax.Array, slots: int) -> DecodeState:
        """Truncates sequence b to its first lengths[b] tokens, in a cache of `slots` slots.

        `hidden` is not updated: a shortened sequence must be extended before decoding continues.
        """
        ends = self.cache.index - self.lengths + lengths
        return self.replace(cache=align_cache(self.cache, ends, slots), lengths=lengths)

    @staticmethod
    def weave(states: Sequence[DecodeState], slots: int) -> DecodeState:
        """Interleaves the sequences of several states [B] to [B · states]."""
        states = [state.truncate(state.lengths, slots) for state in states]

        def woven(axis, *arrays):
            stacked = jnp.stack(arrays, axis + 1)
            return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])

        k, v = (woven(1, *(getattr(s.cache, name) for s in states)) for name in ("k", "v"))
        cache = KVCache(k, v, jnp.int32(slots))
        return DecodeState(
            cache, woven(0, *(s.lengths for s in states)), woven(0, *(s.hidden for s in states))
        )
