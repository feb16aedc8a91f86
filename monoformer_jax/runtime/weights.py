"""Loads the weights of a run, for sampling or to initialise another run."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh

from monoformer_jax.config import Config, LoraConfig, MeshConfig
from monoformer_jax.errors import require
from monoformer_jax.models import trainable
from monoformer_jax.nn import lora
from monoformer_jax.parallel import make_mesh
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import read_config

# Keys of a model that affect no loaded parameter, and those that affect only image modules.
_NO_PARAMETERS = ("dtype", "remat", "scan_unroll", "attention", "zero_image_head")
_IMAGE_MODULES = ("channels", "patch_size", "feature_dim", "original", "predict_variance",
                  "patch_codec", "codec_dim", "codec_blocks", "max_patches")  # fmt: skip


def load_trained(
    workdir: epath.PathLike,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    step: int | Literal["best"] | None = None,
) -> tuple[Config, dict, dict]:
    """Config, EMA weights and {"step", "train_seconds"} of a checkpoint, by default the newest.

    The weights are placed by the rules table, whatever mesh they were trained on, without the optimizer
    state. LoRA adapters are merged into their base model, which is read from `config.init_from`.

    Args:
      workdir: folder of the run.
      dtype: dtype of the weights; None keeps float32, as in the checkpoint.
      mesh: devices to place them on; None is one device.
      step: see `Checkpoints.restore_ema`.

    Raises:
      InputError: the workdir has no trained model, or its checkpoint cannot be read.
    """
    config = read_config(workdir)
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    target = trainable.abstract(config.model, config.lora, mesh)

    def cast(x):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)

    with Checkpoints(workdir) as checkpoints:
        if not config.lora.rank:
            return config, *checkpoints.restore_ema(jax.tree.map(cast, target), step)
        trained, meta = checkpoints.restore_ema(target, step)
    merged = dataclasses.replace(config, lora=LoraConfig(), init_from="")
    target = trainable.abstract(merged.model, merged.lora, mesh)
    params = load_weights(config.init_from, target, config.model)
    adapters = trained.pop("lora")
    params = lora.merge(params, adapters, config.lora) | trained
    return merged, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params), meta


def load_weights(workdir: epath.PathLike, target: dict, model: Any) -> dict:
    """EMA weights of another run, with the shardings of `target`, to initialise a run of `model`.

    Modules that `convert` initialised, the image layers of a LLaMA, are not returned: the run
    initialises its own, for its objective and its latents.

    Raises:
      InputError: see `check_init_from`.
    """
    untrained = check_init_from(workdir, model)
    mesh = jax.tree.leaves(target)[0].sharding.mesh
    stored = trainable.abstract(read_config(workdir).model, LoraConfig(), mesh)
    wanted = {name: leaf for name, leaf in target.items() if name not in untrained}
    with Checkpoints(workdir) as checkpoints:
        weights = checkpoints.restore_ema(stored | wanted)[0]
    return {name: weights[name] for name in wanted}


def check_init_from(workdir: epath.PathLike, model: Any) -> list[str]:
    """Checks that a run of `model` can start from the weights of a workdir; reads none of them.

    Returns:
      Modules without trained weights in it, see `Checkpoints.untrained`.

    Raises:
      InputError: the workdir has no model, a different model, or adapters that are not merged.
    """
    config = read_config(workdir)
    source = config.model
    require(
        source.kind == model.kind, f"init_from={workdir} holds a {source.kind}, not a {model.kind}"
    )
    require(
        not config.lora.rank,
        f"init_from={workdir} holds adapters; merge them first: python -m monoformer_jax.convert "
        f"--from={workdir} --to=DIR --format=orbax",
    )
    with Checkpoints(workdir) as checkpoints:
        untrained = checkpoints.untrained()
    free = _NO_PARAMETERS + (_IMAGE_MODULES if untrained else ())
    changed = [
        f"{field.name} (was {getattr(source, field.name)!r}, now {getattr(model, field.name)!r})"
        for field in dataclasses.fields(source)
        if field.name not in free and getattr(source, field.name) != getattr(model, field.name)
    ]
    require(not changed, f"init_from={workdir} holds another model: {', '.join(changed)}")
    return untrained
