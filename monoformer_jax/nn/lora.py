"""Low-rank adapters (LoRA, arXiv 2106.09685) for the seven matrices of every block.

    y = x W + (alpha / rank) (x A) B        W frozen, A [in, rank] random, B [rank, out] zero at first

Adapters are a tree of their own, stacked over the layers as the blocks are: {"attention": {"q": {"a",
"b"}, …}, "mlp": …}. `merge` adds them to the matrices, after which nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from monoformer_jax.config import LoraConfig, ModelConfig

# Logical axes of each matrix: what goes in, what comes out.
_MATRICES = {
    "attention": {
        "q": ("embed", "heads"),
        "k": ("embed", "kv_heads"),
        "v": ("embed", "kv_heads"),
        "out": ("heads", "embed"),
    },
    "mlp": {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")},
}

Adapters = dict[str, Any]


def init(c: ModelConfig, rank: int, key: jax.Array) -> Adapters:
    """Fresh adapters, float32: a model with them computes what it computes without."""
    sizes = {
        "embed": c.embed_dim,
        "heads": c.num_heads * c.head_dim,
        "kv_heads": c.num_kv_heads * c.head_dim,
        "mlp": c.mlp_dim,
    }
    keys = iter(jax.random.split(key, sum(map(len, _MATRICES.values()))))

    def pair(inside, outside):
        a = jax.random.normal(next(keys), (c.num_layers, sizes[inside], rank))
        b = jnp.zeros((c.num_layers, rank, sizes[outside]))
        return {"a": a * sizes[inside] ** -0.5, "b": b}

    return _each(pair)


def axes() -> Adapters:
    """Logical axis names, in the tree of `init`; see `parallel.RULES`."""
    return _each(lambda i, o: {"a": ("layers", i, None), "b": ("layers", None, o)})


def scaled(adapters: Adapters, c: LoraConfig) -> Adapters:
    """With alpha / rank inside B, as the blocks take them."""
    return _map_pairs(lambda pair: {"a": pair["a"], "b": pair["b"] * (c.alpha / c.rank)}, adapters)


def add(y: jax.Array, x: jax.Array, adapters: Mapping[str, Any] | None, name: str) -> jax.Array:
    """y, the matrix's product with x [B, L, in], and what its scaled adapter adds to it."""
    if adapters is None:
        return y
    pair = adapters[name]
    return y + (x @ pair["a"].astype(x.dtype)) @ pair["b"].astype(x.dtype)


def merge(layers: dict, adapters: Adapters, c: LoraConfig) -> dict:
    """The parameters of the stacked blocks with their adapters added in, float32."""
    merged = dict(layers)
    for group, pairs in scaled(adapters, c).items():
        merged[group] = dict(layers[group])
        for name, pair in pairs.items():
            kernel = jnp.asarray(layers[group][name], jnp.float32)
            merged[group][name] = kernel + (pair["a"] @ pair["b"]).reshape(kernel.shape)
    return merged


def _each(make) -> Adapters:
    return {
        group: {name: make(*ends) for name, ends in matrices.items()}
        for group, matrices in _MATRICES.items()
    }


def _map_pairs(function, adapters: Adapters) -> Adapters:
    return {g: {n: function(pair) for n, pair in pairs.items()} for g, pairs in adapters.items()}
