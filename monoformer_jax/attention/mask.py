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

A document may end with noised copies of its images (`data.noised_copies`). A copy sees its document up
to its original, and itself: two ranges. `row_masks` returns them as two masks, each with the property
above, whose union `interval_attention` takes. Here are `<s> <i> T p </i> a </s>` and a copy of its
image, the second range in the last two columns:

                <s><i> T  p  </i> a </s> T  p    start stop   start stop
    </s>         1  1  1  1  1  1  1  .  .         0    7       0    0
    T            1  1  .  .  .  .  .  1  .         7    8       0    2
    p            1  1  .  .  .  .  .  1  1         7    9       0    2
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import PAD, PATCH


@flax.struct.dataclass
class IntervalMask:
    """Query l of row b sees the keys [start[b, l], stop[b, l]); an empty range sees nothing."""

    start: jax.Array  # int32 [B, L]
    stop: jax.Array  # int32 [B, L]


def interval_mask(
    token_types: jax.Array, segment_ids: jax.Array, image_ids: jax.Array
) -> IntervalMask:
    """Builds the mask of packed rows; PAD may precede or follow the documents.

    Args:
      token_types, segment_ids, image_ids: int32 [B, L], see `batch`.
    """
    length = token_types.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)
    after = jnp.pad(image_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    image_end = jnp.where(image_ids != after, index + 1, length)
    image_end = jax.lax.cummin(image_end, axis=1, reverse=True)
    stop = jnp.where(token_types == PATCH, image_end, index + 1)
    # An empty range at the end of the last real token keeps both vectors monotone.
    last_stop = jax.lax.cummax(jnp.where(token_types == PAD, 0, stop), axis=1)
    return IntervalMask(jnp.where(token_types == PAD, last_stop, start), last_stop)


def row_masks(
    fields: Mapping[str, jax.Array], token_types: jax.Array | None = None
) -> tuple[IntervalMask, ...]:
    """The masks of packed rows whose union each token sees: one, or two with noised copies.

    Args:
      fields: token_types, segment_ids, image_ids and prefix_stop of rows [B, L], see `batch`.
      token_types: int32 [B, L], those that determine the mask; default: those of the rows.
    """
    types = fields["token_types"] if token_types is None else token_types
    segments, images = fields["segment_ids"], fields["image_ids"]
    mask = interval_mask(types, segments, images)
    if not fields["prefix_stop"].shape[-1]:
        return (mask,)
    prefix = IntervalMask(mask.start, jnp.maximum(fields["prefix_stop"][..., 0], mask.start))
    copied = prefix.start < prefix.stop
    index = jnp.arange(images.shape[1], dtype=jnp.int32)
    before = jnp.pad(images[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    image_start = jax.lax.cummax(jnp.where(images != before, index, 0), axis=1)
    return IntervalMask(jnp.where(copied, image_start, mask.start), mask.stop), prefix


def dense_mask(mask: IntervalMask | tuple[IntervalMask, ...], keys: int) -> jax.Array:
    """Expands the mask, or the union of masks, to bool [B, L, keys]."""
    key = jnp.arange(keys, dtype=jnp.int32)
    masks = mask if isinstance(mask, tuple) else (mask,)
    ranges = ((m.start[..., None] <= key) & (key < m.stop[..., None]) for m in masks)
    return functools.reduce(jnp.logical_or, ranges)


class BlockBounds(NamedTuple):
    """The blocks of the other side (keys or queries) that each block visits: [lo, hi), all int32.

    Blocks in [full_lo, full_hi) are fully visible, so a kernel applies the mask only in
    [lo, full_lo) and [full_hi, hi). lo <= full_lo <= full_hi <= hi.
    """

    lo: jax.Array
    full_lo: jax.Array
    full_hi: jax.Array
    hi: jax.Array


def key_block_bounds(mask: IntervalMask, block_q: int, block_k: int) -> BlockBounds:
    """For each query block the key blocks that it sees: int32 [B, L // block_q] per bound.

    Correct for any start <= stop; the bounds are tight if the rows are monotone.

    Args:
      mask: [B, L] with L a multiple of `block_q`.
      block_q, block_k: query and key block sizes in tokens.
    """
    batch, length = mask.start.shape
    blocks = (batch, length // block_q, block_q)
    start, stop = mask.start.reshape(blocks), mask.stop.reshape(blocks)
    sees = start < stop
    first = jnp.where(sees, start, np.iinfo(np.int32).max).min(-1) // block_k
    hi = -(-jnp.where(sees, stop, 0).max(-1) // block_k)  # 0 for a block that sees nothing
    lo = jnp.minimum(first, hi)
    full_lo = jnp.clip(-(-start.max(-1) // block_k), lo, hi)
    full_hi = jnp.clip(jnp.where(sees.all(-1), stop.min(-1) // block_k, 0), full_lo, hi)
    return BlockBounds(*(x.astype(jnp.int32) for x in (lo, full_lo, full_hi, hi)))


def query_block_bounds(bounds: BlockBounds, key_blocks: int) -> BlockBounds:
    """Transposes the bounds: for each key block the query blocks that see it.

    Args:
      bounds: bounds of the query blocks, [B, Q].
      key_blocks: number of key blocks J.

    Returns:
      int32 [B, J] per bound. A range may include query blocks that see nothing of this key block
      (rows that are not monotone, PAD in the middle); the mask handles those. If the fully visible
      blocks are not contiguous, only the first contiguous run counts as full.
    """
    number = bounds.lo.shape[1]
    key = jnp.arange(key_blocks, dtype=jnp.int32)[None, :, None]
    query = jnp.arange(number, dtype=jnp.int32)
    lo, full_lo, full_hi, hi = (x[:, None, :] for x in bounds)
    touched = (lo <= key) & (key < hi)  # [B, J, Q]
    full = (full_lo <= key) & (key < full_hi)
    end = jnp.where(touched, query + 1, 0).max(-1)
    begin = jnp.minimum(jnp.where(touched, query, number).min(-1), end)
    run = jnp.minimum(jnp.where(full, query, number).min(-1), end)
    after = jnp.where((query >= run[..., None]) & ~full, query, number).min(-1)
    return BlockBounds(begin, run, jnp.minimum(after, end), end)


def mask_area(masks: IntervalMask | tuple[IntervalMask, ...]) -> jax.Array:
    """Number of visible (query, key) pairs of a mask or a union: int32 [B]."""
    masks = masks if isinstance(masks, tuple) else (masks,)
    return sum((mask.stop - mask.start).sum(-1) for mask in masks)


def check_mask(masks: IntervalMask | tuple[IntervalMask, ...], keys: int) -> None:
    """Raises ValueError, naming row and query, if a range is invalid. Runs on the host.

    Args:
      masks: one mask, or the disjoint masks of a union.
      keys: number of keys S that the ranges index.
    """
    masks = masks if isinstance(masks, tuple) else (masks,)
    ends = [(np.asarray(m.start), np.asarray(m.stop)) for m in masks]

    def stop_at(broken: np.ndarray, text: str) -> None:
        if broken.any():
            row, query = np.argwhere(broken)[0]
            ranges = ", ".join(f"[{a[row, query]}, {b[row, query]})" for a, b in ends)
            raise ValueError(f"mask row {row}, query {query} sees {ranges}: {text}")

    for start, stop in ends:
        stop_at(start > stop, "start is greater than stop")
        stop_at((start < 0) | (stop > keys), f"a range extends outside the {keys} keys")
    for i, (start, stop) in enumerate(ends):
        for other_start, other_stop in ends[:i]:
            shared = np.minimum(stop, other_stop) - np.maximum(start, other_start)
            stop_at(shared > 0, "the ranges of a union overlap")
