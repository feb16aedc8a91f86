"""Attention under the interval mask: `attend` is the one door, whatever runs behind it."""

from __future__ import annotations

import jax

from monoformer_jax.attention.dense import dense_attention
from monoformer_jax.attention.mask import IntervalMask, dense_mask, interval_mask

__all__ = ["IMPLEMENTATIONS", "IntervalMask", "attend", "dense_mask", "interval_mask"]

IMPLEMENTATIONS = ("auto", "dense")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: IntervalMask, *, impl: str = "auto"
) -> jax.Array:
    """Grouped-query attention in which query l of row b sees the keys [start, stop) of the mask.

    Args:
      q: [B, L, N, H].
      k, v: [B, S, K, H]; N must be a multiple of K.
      mask: ranges over the S keys; required, so that no caller can forget it.
      impl: "dense" is plain XLA; "auto" picks what fits the platform.

    Returns:
      [B, L, N, H] in q's dtype; exactly 0 for a query that sees nothing.

    Raises:
      ValueError: shapes that do not fit together, or an unknown `impl`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    batch, length, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape != v.shape or k.shape != (batch, keys, kv_heads, head_dim):
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    if mask.start.shape != (batch, length) or mask.stop.shape != (batch, length):
        raise ValueError(f"mask is {mask.start.shape}, {mask.stop.shape} for q {q.shape}")
    return dense_attention(q, k, v, mask)[0]
