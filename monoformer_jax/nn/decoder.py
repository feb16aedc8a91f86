"""The transformer decoder: stacked, scanned blocks with an explicit key/value cache."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from monoformer_jax.attention import IntervalMask
from monoformer_jax.nn.cache import KVCache
from monoformer_jax.nn.config import DecoderConfig
from monoformer_jax.nn.layers import Attention, RMSNorm, SwiGLU
from monoformer_jax.nn.lora import Adapters
from monoformer_jax.parallel import BATCH


def constrain_activations(x: jax.Array) -> jax.Array:
    """Shards the activations [B, L, D] over the batch only, if a mesh is set.

    Otherwise XLA also shards D over `tensor`, as the embeddings are, and all-gathers it before every
    product of every block. Constrained, a block has two reductions over `tensor` in each pass.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(c, rngs)
        self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.mlp = SwiGLU(c, rngs)

    def __call__(self, x, positions, mask, cache, index, adapters=None):
        layer_adapters, shape = {} if adapters is None else adapters, x.shape
        if cache is None:  # training: 2-D matrix products are fastest on a CPU
            x = rearrange(x, "B L D -> (B L) D")
        h = self.attention_norm(x)
        out, cache = self.attention(
            h, positions, mask, cache, index, layer_adapters.get("attention")
        )
        x = checkpoint_name(x + out, "residual")
        return (x + self.mlp(self.mlp_norm(x), layer_adapters.get("mlp"))).reshape(shape), cache


class Decoder(nnx.Module):
    """[B, L, D] -> [B, L, D]: the stacked blocks and the final norm."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        build = nnx.split_rngs(splits=c.num_layers)(nnx.vmap(lambda rngs: Block(c, rngs)))
        self.layers = build(rngs)
        self.norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.remat, self.num_layers = c.remat, c.num_layers
        self.scan_unroll = math.gcd(c.num_layers, c.scan_unroll)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: IntervalMask | tuple[IntervalMask, ...],
        cache: KVCache | None = None,
        input_bias: jax.Array | None = None,
        adapters: Adapters | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the blocks; with a cache, writes the L tokens to its slots from cache.index on.

        `input_bias` [B, L, D] is added to the input of every block but the first. `adapters` are
        the scaled LoRA adapters of all blocks.
        """
        index = None if cache is None else cache.index

        def body(x, layer):
            block, kv, gate, layer_adapters = layer
            if input_bias is not None:
                x = x + gate * input_bias
            return block(x, positions, mask, kv, index, layer_adapters)

        if self.remat != "none" and cache is None:
            body = jax.checkpoint(body, policy=_policy(self.remat), prevent_cse=False)
        kv = None if cache is None else (cache.k, cache.v)
        gates = None if input_bias is None else (jnp.arange(self.num_layers) > 0).astype(x.dtype)
        blocks = (self.layers, kv, gates, adapters)
        if self.scan_unroll > 1 and cache is None:
            body, blocks = _unrolled(body, blocks, self.scan_unroll)
        x, kv = jax.lax.scan(body, constrain_activations(x), blocks)
        if cache is not None:
            cache = KVCache(*kv, cache.index + x.shape[1])
        return constrain_activations(self.norm(constrain_activations(x))), cache


def _unrolled(body, blocks, count: int):
    """Body and input of a scan whose turns run `count` blocks without a cache.

    The `unroll` of `jax.lax.scan` would stack what the blocks of a turn save, which is a copy on a TPU
    (docs/benchmarks.md).
    """

    def several(x, blocks):
        for i in range(count):
            x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], blocks))
        return x, None

    return several, jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), blocks)


def _policy(remat: str):
    """The checkpoint policy that `DecoderConfig.remat` names."""
    name, _, names = remat.partition(":")
    if name == "save_names":
        return jax.checkpoint_policies.save_only_these_names(*names.split(","))
    return getattr(jax.checkpoint_policies, name)
