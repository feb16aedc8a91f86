"""Which parameters of a model a run trains: all, or with LoRA the adapters and the image parts.

With adapters the rest is frozen: in the compute dtype, and in no checkpoint.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from monoformer_jax.config import LoraConfig, ModelConfig
from monoformer_jax.models import monoformer
from monoformer_jax.nn import lora
from monoformer_jax.parallel import abstract_params

_FROZEN = ("decoder", "token_embedding", "text_head")  # where there are adapters


def init(c: ModelConfig, adapters: LoraConfig, key: jax.Array) -> dict:
    """Fresh parameters that are trained, float32."""
    params = monoformer.init(c, key)
    if not adapters.rank:
        return params
    params = {name: params[name] for name in params if name not in _FROZEN}
    return params | {"lora": lora.init(c, adapters.rank, jax.random.fold_in(key, 1))}


def logical_axes(c: ModelConfig, adapters: LoraConfig) -> dict:
    """Logical axis names, in the tree of `init`."""
    axes = monoformer.logical_axes(c)
    if not adapters.rank:
        return axes
    return {name: axes[name] for name in axes if name not in _FROZEN} | {"lora": lora.axes()}


def abstract(c: ModelConfig, adapters: LoraConfig, mesh: Mesh) -> dict:
    """The tree of `init` as ShapeDtypeStructs with their shardings."""
    shapes = jax.eval_shape(lambda: init(c, adapters, jax.random.key(0)))
    return abstract_params(logical_axes(c, adapters), shapes, mesh)


def abstract_frozen(c: ModelConfig, adapters: LoraConfig, mesh: Mesh) -> dict:
    """What is not trained, as ShapeDtypeStructs with their shardings; {} where everything is."""
    if not adapters.rank:
        return {}
    shapes = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    axes = monoformer.logical_axes(c)
    shapes, axes = ({name: tree[name] for name in _FROZEN} for tree in (shapes, axes))

    def leaf(x, names):
        # Norms multiply in float32; everything else is cast where it is used.
        dtype = x.dtype if "norm" in names else c.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(leaf, abstract_params(axes, shapes, mesh), axes)
