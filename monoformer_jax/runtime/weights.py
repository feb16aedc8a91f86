"""Loading the weights of a run, for sampling or to start another run from."""

from __future__ import annotations

import dataclasses

import jax
from etils import epath

from monoformer_jax.config import Config, LoraConfig, MeshConfig, ModelConfig
from monoformer_jax.errors import require
from monoformer_jax.models import trainable
from monoformer_jax.nn import lora
from monoformer_jax.parallel import make_mesh
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import read_config


def load_trained(workdir: epath.PathLike, dtype: str | None = None) -> tuple[Config, dict, dict]:
    """Config, averaged weights and {"step", "train_seconds"} of the newest checkpoint.

    The weights come to one device, whatever mesh and however many processes they were trained on.
    Adapters are merged into the model that they adapt, which is read from its own workdir.

    Args:
      workdir: folder of the run.
      dtype: of the weights; "bfloat16" halves what they take, and no optimizer is read. None is
        float32, as they were trained.

    Raises:
      InputError: no trained model there, or a checkpoint that cannot be read.
    """
    config = read_config(workdir)
    one_device = make_mesh(MeshConfig(), jax.local_devices()[:1])
    target = trainable.abstract(config.model, config.lora, one_device)

    def cast(x):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)

    with Checkpoints(workdir) as checkpoints:
        if not config.lora.rank:
            return config, *checkpoints.restore_ema(jax.tree.map(cast, target))
        trained, meta = checkpoints.restore_ema(target)
    merged = dataclasses.replace(config, lora=LoraConfig(), init_from="")
    target = trainable.abstract(merged.model, merged.lora, one_device)
    params = load_weights(config.init_from, target, config.model)
    adapters = trained.pop("lora")
    params["decoder"]["layers"] = lora.merge(params["decoder"]["layers"], adapters, config.lora)
    params |= trained
    return (
        merged,
        params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params),
        meta,
    )


def load_weights(workdir: epath.PathLike, target: dict, model: ModelConfig) -> dict:
    """Averaged weights of another run, placed as `target` says, for a run of this model.

    Raises:
      InputError: there is no model, or one with other parameters.
    """
    config = read_config(workdir)
    there = config.model
    require(
        not config.lora.rank,
        f"init_from={workdir} holds adapters; merge them first: python -m monoformer_jax.convert "
        f"--from={workdir} --to=DIR --format=orbax",
    )
    # How it is computed may differ; what its parameters are may not.
    changed = [
        f"{field.name} ({getattr(there, field.name)!r} there, {getattr(model, field.name)!r} now)"
        for field in dataclasses.fields(there)
        if field.name not in ("dtype", "remat", "attention")
        and getattr(there, field.name) != getattr(model, field.name)
    ]
    require(not changed, f"init_from={workdir} holds another model: {', '.join(changed)}")
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_ema(target)[0]
