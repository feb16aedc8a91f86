"""Low-rank adapters (LoRA, arXiv 2106.09685) of the matrices of stacked layers.

    y = x W + (alpha / rank) (x A) B        W frozen, A [in, rank] random, B [rank, out] initially zero

Adapters are a separate tree with the structure of the adapted parameters: {"a": [layers, in, rank],
"b": [layers, rank, out]} in place of each matrix. `merge` adds them to the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monoformer_jax.config import LoraConfig

Adapters = dict[str, Any]
# Path of each adapted matrix -> logical axes of its input and output.
Adapted = Mapping[str, tuple[str, str]]


def init(adapted: Adapted, shapes: Mapping, axes: Mapping, rank: int, key: jax.Array) -> Adapters:
    """Initializes adapters, float32; they do not change the model's outputs until trained.

    Args:
      adapted: see `models.MODELS`.
      shapes, axes: shapes and logical axes of all parameters, see `models.MODELS`.
    """
    keys = jax.random.split(key, len(adapted))
    made = {}
    for path, key in zip(adapted, keys):
        layers, inside, outside = _sizes(path, adapted[path], shapes, axes)
        a = jax.random.normal(key, (layers, inside, rank)) * inside**-0.5
        made[path] = {"a": a, "b": jnp.zeros((layers, rank, outside))}
    return _nested(made)


def _sizes(path: str, ends: tuple[str, str], shapes: Mapping, axes: Mapping):
    """Layers, input size and output size of a stacked matrix; the output begins at axis ends[1]."""
    shape = _at(shapes, path).shape
    second = _at(axes, path).index(ends[1], 2)
    return shape[0], math.prod(shape[1:second]), math.prod(shape[second:])


def logical_axes(adapted: Adapted) -> Adapters:
    """Logical axis names of adapters, in the tree of `init`; see `parallel.RULES`."""
    return _nested({
        path: {"a": ("layers", inside, None), "b": ("layers", None, outside)}
        for path, (inside, outside) in adapted.items()
    })  # fmt: skip


def scaled(adapters: Adapters, c: LoraConfig) -> Adapters:
    """Multiplies B by alpha / rank, as the layers expect."""
    factor = c.alpha / c.rank
    return jax.tree.map(
        lambda pair: {"a": pair["a"], "b": pair["b"] * factor}, adapters, is_leaf=_is_pair
    )


def add(y: jax.Array, x: jax.Array, adapters: Mapping[str, Any] | None, name: str) -> jax.Array:
    """Adds the output of a scaled adapter to y, the product of its matrix with x [B, L, in]."""
    if adapters is None:
        return y
    pair = adapters[name]
    return y + (x @ pair["a"].astype(x.dtype)) @ pair["b"].astype(x.dtype)


def merge(params: Mapping, adapters: Adapters, c: LoraConfig) -> dict:
    """Adds the adapters to their matrices; merged matrices are float32."""
    if _is_pair(adapters):
        pair = scaled(adapters, c)
        kernel = jnp.asarray(params, jnp.float32)
        product = jnp.matmul(pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)
        return kernel + product.reshape(kernel.shape)
    merged = {name: merge(params[name], adapters[name], c) for name in adapters}
    return {**params, **merged}


def _is_pair(tree) -> bool:
    return isinstance(tree, Mapping) and tree.keys() == {"a", "b"}


def _at(tree: Mapping, path: str):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _nested(by_path: Mapping[str, Any]) -> Adapters:
    return nnx.traversals.unflatten_mapping(
        {tuple(path.split("/")): value for path, value in by_path.items()}
    )
