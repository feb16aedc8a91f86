"""Interval attention in plain XLA: the reference for every kernel, and the CPU implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from monoformer_jax.attention.mask import IntervalMask, dense_mask

# Finite, so that a query that sees nothing yields 0 and no NaN in either pass.
EMPTY_LSE = -1e30


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask | tuple[IntervalMask, ...],
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over one key range per query; scores and statistics are float32.

    Args:
      q: [B, L, N, H]. k, v: [B, S, K, H] with N a multiple of K; query head n uses key/value head
        n // (N // K), and k and v are never repeated.
      mask: ranges over the S keys, or several masks for their union.

    Returns:
      Output [B, L, N, H] in q's dtype and the log-sum-exp of the scaled scores, float32 [B, L, N].
      A query that sees nothing has output 0, log-sum-exp `EMPTY_LSE` and no gradient.
    """
    kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    allowed = dense_mask(mask, k.shape[1])[:, None, None]  # [B, 1, 1, L, S]
    # Plain matrix products, [G·L, H] by [H, S]: with other layouts a CPU transposes the scores.
    length = q.shape[1]
    q = rearrange(q, "B L (K G) H -> B K (G L) H", K=kv_heads)
    k, v = rearrange(k, "B S K H -> B K H S"), rearrange(v, "B S K H -> B K S H")
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * scale
    scores = rearrange(scores, "B K (G L) S -> B K G L S", L=length)
    scores = jnp.where(allowed, scores, EMPTY_LSE)
    # A maximum above EMPTY_LSE makes every masked weight exp(-huge) = 0, also in empty rows.
    top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), EMPTY_LSE / 10)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe), EMPTY_LSE)
    weights = rearrange(weights.astype(v.dtype), "B K G L S -> B K (G L) S")
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    out = out / rearrange(safe, "B K G L 1 -> B K (G L) 1")
    out = rearrange(out, "B K (G L) H -> B L (K G) H", L=length).astype(q.dtype)
    out = checkpoint_name(out, "attention_out")
    return out, rearrange(lse, "B K G L 1 -> B L (K G)")
