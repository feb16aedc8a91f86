"""The decoder: one block, stacked and scanned, with an explicit key/value cache."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from monoformer_jax.attention import IntervalMask
from monoformer_jax.config import ModelConfig
from monoformer_jax.nn.layers import Attention, RMSNorm, SwiGLU
from monoformer_jax.nn.lora import Adapters


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer; whoever holds it decides which slots are read or rewritten."""

    k: jax.Array  # [layers, B, S, K, H]
    v: jax.Array  # [layers, B, S, K, H]
    index: jax.Array  # int32 [], the slot that the next token is written to

    @classmethod
    def create(cls, c: ModelConfig, batch_size: int, slots: int) -> KVCache:
        shape = (c.num_layers, batch_size, slots, c.num_kv_heads, c.head_dim)
        return cls(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), jnp.zeros((), jnp.int32))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(c, rngs)
        self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.mlp = SwiGLU(c, rngs)

    def __call__(self, x, positions, mask, cache, index, adapters):
        own = {} if adapters is None else adapters
        out, cache = self.attention(
            self.attention_norm(x), positions, mask, cache, index, own.get("attention")
        )
        x = x + out
        return x + self.mlp(self.mlp_norm(x), own.get("mlp")), cache


class Decoder(nnx.Module):
    """[B, L, D] -> [B, L, D]: the stack of blocks and the final norm."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        build = nnx.split_rngs(splits=c.num_layers)(nnx.vmap(lambda rngs: Block(c, rngs)))
        self.layers = build(rngs)
        self.norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.remat, self.num_layers = c.remat, c.num_layers

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: IntervalMask,
        cache: KVCache | None = None,
        again: jax.Array | None = None,
        adapters: Adapters | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the blocks; with a cache the L tokens go to its slots from cache.index on.

        What is given as `again`, [B, L, D], is added before every block but the first; `adapters`,
        scaled, are of all blocks.
        """
        index = None if cache is None else cache.index

        def body(x, layer):
            block, kv, share, own = layer
            if again is not None:
                x = x + share * again
            return block(x, positions, mask, kv, index, own)

        if self.remat != "none" and cache is None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        kv = None if cache is None else (cache.k, cache.v)
        shares = None if again is None else (jnp.arange(self.num_layers) > 0).astype(x.dtype)
        x, kv = jax.lax.scan(body, x, (self.layers, kv, shares, adapters))
        if cache is not None:
            cache = KVCache(*kv, cache.index + x.shape[1])
        return self.norm(x), cache
