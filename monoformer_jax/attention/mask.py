"""The mixed causal/bidirectional mask as one contiguous range of keys for each query.

Query q may see the keys of [start(q), stop(q)): start is the first token of its document; stop is
the end of its image for a PATCH and q + 1 for every other token; PAD sees nothing. Here are
`<s> a <img> T p p p </img> </s>`, a second document `<s> b` and one PAD, q down and k across:

               <s> a  <i> T  p  p  p  </i></s><s> b  pad    start stop
    <s>         1  .  .  .  .  .  .  .  .  .  .  .           0    1
    a           1  1  .  .  .  .  .  .  .  .  .  .           0    2
    <img>       1  1  1  .  .  .  .  .  .  .  .  .           0    3
    T           1  1  1  1  .  .  .  .  .  .  .  .           0    4
    p           1  1  1  1  1  1  1  .  .  .  .  .           0    7
    p           1  1  1  1  1  1  1  .  .  .  .  .           0    7
    p           1  1  1  1  1  1  1  .  .  .  .  .           0    7
    </img>      1  1  1  1  1  1  1  1  .  .  .  .           0    8
    </s>        1  1  1  1  1  1  1  1  1  .  .  .           0    9
    <s>         .  .  .  .  .  .  .  .  .  1  .  .           9   10
    b           .  .  .  .  .  .  .  .  .  1  1  .           9   11
    pad         .  .  .  .  .  .  .  .  .  .  .  .          11   11

Neither start nor stop ever decreases along the row, so the queries that see a key are one range
too: this is what lets a kernel skip blocks in both passes with two int32 vectors a row.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from monoformer_jax.batch import PAD, PATCH


@flax.struct.dataclass
class IntervalMask:
    """Query l of row b sees the keys [start[b, l], stop[b, l]); equal ends see nothing."""

    start: jax.Array  # int32 [B, L]
    stop: jax.Array  # int32 [B, L]


def interval_mask(kinds: jax.Array, segment_ids: jax.Array, image_ids: jax.Array) -> IntervalMask:
    """The mask of packed rows; PAD may stand on either side of the documents.

    Args:
      kinds, segment_ids, image_ids: int32 [B, L], see `batch`.
    """
    length = kinds.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)
    after = jnp.pad(image_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    image_end = jnp.where(image_ids != after, index + 1, length)
    image_end = jax.lax.cummin(image_end, axis=1, reverse=True)
    stop = jnp.where(kinds == PATCH, image_end, index + 1)
    # An empty range at the end of the last real token keeps both vectors monotone.
    last_stop = jax.lax.cummax(jnp.where(kinds == PAD, 0, stop), axis=1)
    return IntervalMask(jnp.where(kinds == PAD, last_stop, start), last_stop)


def dense_mask(mask: IntervalMask, keys: int) -> jax.Array:
    """The same mask as bool [B, L, keys]."""
    key = jnp.arange(keys, dtype=jnp.int32)
    return (mask.start[..., None] <= key) & (key < mask.stop[..., None])
