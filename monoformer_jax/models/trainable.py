"""Trainable parameters of a run: all, or with LoRA the adapters and the image modules.

With LoRA, the other parameters are frozen, in the compute dtype, and not in checkpoints.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from monoformer_jax.config import LoraConfig
from monoformer_jax.models import abstract_params, get_model
from monoformer_jax.nn import lora
from monoformer_jax.parallel import abstract_arrays


def init(c: Any, adapters: LoraConfig, key: jax.Array) -> dict:
    """Initializes the trainable parameters, float32.

    Args:
      c: config of the model.
      adapters: config of the adapters.
    """
    model = get_model(c)
    params = model.init(c, key)
    if not adapters.rank:
        return params
    adapted, axes, key = model.adapters(c), model.logical_axes(c), jax.random.fold_in(key, 1)
    trained = {name: params[name] for name in params if name not in model.FROZEN}
    return trained | {"lora": lora.init(adapted, params, axes, adapters.rank, key)}


def logical_axes(c: Any, adapters: LoraConfig) -> dict:
    """Logical axis names of the trainable parameters, in the tree of `init`."""
    model = get_model(c)
    axes = model.logical_axes(c)
    if not adapters.rank:
        return axes
    trained = {name: axes[name] for name in axes if name not in model.FROZEN}
    return trained | {"lora": lora.logical_axes(model.adapters(c))}


def abstract(c: Any, adapters: LoraConfig, mesh: Mesh) -> dict:
    """The trainable parameters as ShapeDtypeStructs with their shardings."""
    shapes = abstract_params(c)
    if adapters.rank:
        shapes = jax.eval_shape(lambda: init(c, adapters, jax.random.key(0)))
    return abstract_arrays(logical_axes(c, adapters), shapes, mesh)


def abstract_frozen(c: Any, adapters: LoraConfig, mesh: Mesh) -> dict:
    """The frozen parameters as ShapeDtypeStructs with their shardings; {} without LoRA."""
    if not adapters.rank:
        return {}
    model = get_model(c)
    trees = abstract_params(c), model.logical_axes(c)
    shapes, axes = ({name: tree[name] for name in model.FROZEN} for tree in trees)

    def leaf(x, names):
        # Norm scales are used in float32; all other parameters are cast to the compute dtype at use.
        dtype = x.dtype if "norm" in names else c.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(leaf, abstract_arrays(axes, shapes, mesh), axes)
