"""The train state, created sharded, and the jitted train step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax.attention import require_platform
from monoformer_jax.batch import PAD, Batch
from monoformer_jax.config import Config
from monoformer_jax.data.pipeline import check_streams
from monoformer_jax.errors import InputError
from monoformer_jax.models import trainable
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import check_batch_size, fitting_layout, make_mesh
from monoformer_jax.runtime.compiler import compiler_options
from monoformer_jax.training.losses import (
    Noise,
    draw_latents,
    draw_noise,
    loss_fn,
    loss_normalizers,
)
from monoformer_jax.training.metrics import TrainMetrics
from monoformer_jax.training.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # int32 [], steps done
    params: dict
    ema: dict  # float32 EMA of params, used for sampling
    opt_state: optax.OptState
    # With LoRA: the frozen parameters, in the compute dtype. They are not in checkpoints.
    frozen: dict = flax.struct.field(default_factory=dict)


def _init(config: Config) -> TrainState:
    params = trainable.init(config.model, config.lora, jax.random.key(config.seed))
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, _optimizer(config).init(params))


def _optimizer(config: Config) -> optax.GradientTransformation:
    axes = trainable.logical_axes(config.model, config.lora)
    return make_optimizer(config.optimizer, config.steps, axes)


def abstract_train_state(config: Config, mesh: Mesh) -> TrainState:
    """The train state as ShapeDtypeStructs with shardings; nothing is allocated."""
    params, optimizer = trainable.abstract(config.model, config.lora, mesh), _optimizer(config)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        lambda x, param: place(x, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: place(x, replicated),
    )
    frozen = trainable.abstract_frozen(config.model, config.lora, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, params, opt_state, frozen)


def check_layout(config: Config, devices: list | None = None) -> Mesh:
    """Returns the mesh of a run on these devices, by default all of the process or the slice.

    Raises:
      InputError: devices, mesh, batch size, micro-batches and streams do not fit together; it names
        the closest values that do. Or the attention kernel is that of another platform.
    """
    devices = jax.devices() if devices is None else devices
    micro = config.optimizer.grad_accum_steps
    # Only models with attention have the key.
    require_platform(getattr(config.model, "attention", "auto"), devices[0].platform)
    try:
        mesh = make_mesh(config.mesh, devices)
        check_batch_size(config.batch_size, micro, mesh)
        abstract_train_state(config, mesh)
    except InputError as error:
        axes = trainable.logical_axes(config.model, config.lora)
        shapes = jax.eval_shape(functools.partial(_init, config)).params
        found = fitting_layout(
            axes, shapes, config.mesh, devices, config.batch_size, micro, config.data.streams or 1
        )
        if found is None:
            raise InputError(f"{error}; no mesh of {len(devices)} devices fits") from None
        mesh, rows = found
        sizes = "".join(f" --config.mesh.{k}={v}" for k, v in dataclasses.asdict(mesh).items())
        raise InputError(f"{error}; these fit:{sizes} --config.batch_size={rows}") from None
    check_streams(config, len({device.process_index for device in devices}))
    return mesh


def init_train_state(config: Config, mesh: Mesh) -> TrainState:
    """Initializes the train state, created sharded on the devices; `frozen` is still empty."""
    return make_init(config, mesh)()


def make_init(config: Config, mesh: Mesh) -> Callable[[], TrainState]:
    """Returns the jitted function of `init_train_state`."""
    shardings = jax.tree.map(
        lambda a: a.sharding, abstract_train_state(config, mesh).replace(frozen={})
    )
    return jax.jit(functools.partial(_init, config), out_shardings=shardings)


def make_train_step(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]:
    """Returns the jitted train step; it donates the input state."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_train_state(config, mesh))

    def step(state: TrainState, batch: Batch):
        # The attention kernels are sharded by shard_map and read this mesh.
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            full_precision(config.model.dtype),
        ):
            return _train_step(state, batch, config)

    options = compiler_options(config.compiler_options, mesh.devices.flat[0])
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )


def _train_step(state: TrainState, batch: Batch, config: Config):
    return apply_step(state, *draw_inputs(state.step, batch, config), config)


def draw_inputs(step: jax.Array, batch: Batch, config: Config) -> tuple[Batch, Noise]:
    """Draws all that is random in a step: the latents of the batch, noise levels and noise.

    The key depends only on seed and step: a resumed run draws the same values.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # One split for all: split(key, n)[i] is fold_in(key, i), so a key that is folded besides would
    # be one of these.
    time_key, noise_key, latent_key = jax.random.split(key, 3)
    batch = draw_latents(latent_key, batch)
    return batch, draw_noise(time_key, noise_key, batch, config)


def apply_step(
    state: TrainState, batch: Batch, noise: Noise, config: Config
) -> tuple[TrainState, TrainMetrics]:
    """Applies one optimizer step with the given noise."""
    c = config.optimizer
    loss, parts, grads = _gradients(state.params, state.frozen, batch, noise, config)
    with jax.named_scope("optimizer"):
        updates, opt_state = _optimizer(config).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = c.ema_decay
        if c.ema_ramp:
            decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = TrainMetrics.single_from_model_output(
        loss=loss,
        **parts,
        grad_norm=optax.global_norm(grads),
        param_norm=optax.global_norm(params),
        learning_rate=learning_rate(c, config.steps)(state.step),
        real_token_share=jnp.mean(batch["token_types"] != PAD),
    )
    return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics


def _gradients(params, frozen, batch, noise, config: Config):
    """Loss, its parts and gradients, accumulated over `optimizer.grad_accum_steps` micro-batches."""
    normalizers = loss_normalizers(batch, noise)

    def gradients(batch, noise):
        def loss_of(params):
            return loss_fn(params | frozen, batch, noise, normalizers, config)

        (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, parts, grads

    if config.optimizer.grad_accum_steps == 1:
        return gradients(batch, noise)
    # The micro-batch index is the minor axis, so that rows stay on their device.
    micro = jax.tree.map(
        lambda x: rearrange(x, "(B M) ... -> M B ...", M=config.optimizer.grad_accum_steps),
        (dict(batch), noise),
    )

    def add(total, one):
        return jax.tree.map(jnp.add, total, gradients(*one)), None

    one = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], micro))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, one), micro)[0]
