"""What a run carries from step to step, created sharded, and the jitted step that advances it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax.batch import PAD, Batch
from monoformer_jax.config import Config
from monoformer_jax.models import monoformer
from monoformer_jax.nn import lora
from monoformer_jax.parallel import parameter_shardings
from monoformer_jax.training.losses import Noise, draw_latents, draw_noise, loss_fn, totals
from monoformer_jax.training.metrics import TrainMetrics
from monoformer_jax.training.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # int32 [], steps done
    params: dict
    ema: dict  # float32 moving average of params: what is sampled from
    opt_state: optax.OptState
    # With adapters: the rest of the model, in the compute dtype. It is in no checkpoint.
    frozen: dict = flax.struct.field(default_factory=dict)


_FROZEN = ("decoder", "token_embedding", "text_head")  # by config.lora


def trained_axes(config: Config) -> dict:
    """Logical axis names of what is trained: the parameters, or adapters and the image parts."""
    axes = monoformer.parameter_axes(config.model)
    if not config.lora.rank:
        return axes
    return {name: axes[name] for name in axes if name not in _FROZEN} | {"lora": lora.axes()}


def _init(config: Config) -> TrainState:
    key = jax.random.key(config.seed)
    params = monoformer.init(config.model, key)
    if config.lora.rank:
        params = {name: params[name] for name in params if name not in _FROZEN}
        params["lora"] = lora.init(config.model, config.lora.rank, jax.random.fold_in(key, 1))
    optimizer = make_optimizer(config, trained_axes(config))
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def abstract_frozen(config: Config, mesh: Mesh) -> dict:
    """What config.lora does not train, as ShapeDtypeStructs; {} where all is trained."""
    if not config.lora.rank:
        return {}
    shapes = jax.eval_shape(lambda: monoformer.init(config.model, jax.random.key(0)))
    axes = monoformer.parameter_axes(config.model)
    shapes, axes = ({name: tree[name] for name in _FROZEN} for tree in (shapes, axes))

    def leaf(shape, sharding, names):
        # Norms multiply in float32; everything else is cast where it is used.
        dtype = shape.dtype if "norm" in names else config.model.dtype
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, parameter_shardings(axes, shapes, mesh), axes)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings; nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(_init, config))
    axes = trained_axes(config)
    params = parameter_shardings(axes, shapes.params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        make_optimizer(config, axes),
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    shardings = TrainState(everywhere, params, params, opt_state)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    return state.replace(frozen=abstract_frozen(config, mesh))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Fresh state, every array born on the devices where it stays; nothing frozen is in it yet."""
    return make_init(config, mesh)()


def make_init(config: Config, mesh: Mesh) -> Callable[[], TrainState]:
    """The compiled function behind `init_state`."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).replace(frozen={}))
    return jax.jit(functools.partial(_init, config), out_shardings=shardings)


def make_train_step(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]:
    """The compiled step; it takes over the memory of the state that it is given."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh))

    def step(state: TrainState, batch: Batch):
        # The attention kernels are cut along the mesh by hand, and ask for it here.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _train_step(state, batch, config)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _train_step(state: TrainState, batch: Batch, config: Config):
    # The key is a function of the step alone: a resumed run draws what the first run drew.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    batch = draw_latents(jax.random.fold_in(key, 1), batch)
    return advance(state, batch, draw_noise(key, batch, config), config)


def advance(
    state: TrainState, batch: Batch, noise: Noise, config: Config
) -> tuple[TrainState, TrainMetrics]:
    """One optimizer step with this noise."""
    c = config.optimizer
    loss, parts, grads = _gradients(state.params, state.frozen, batch, noise, config)
    optimizer = make_optimizer(config, trained_axes(config))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = c.ema_decay
    if c.ema_ramp:
        decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    metrics = TrainMetrics.single_from_model_output(
        loss=loss,
        **parts,
        grad_norm=optax.global_norm(grads),
        param_norm=optax.global_norm(params),
        learning_rate=learning_rate(config)(state.step),
        real_token_share=jnp.mean(batch["kinds"] != PAD),
    )
    return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics


def _gradients(params, frozen, batch, noise, config: Config):
    """Loss, its parts and gradients, over `optimizer.accumulation` micro-batches in turn."""
    whole = totals(batch, noise)

    def gradients(batch, noise):
        def loss_of(params):
            return loss_fn(params | frozen, batch, noise, whole, config)

        (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, parts, grads

    if config.optimizer.accumulation == 1:
        return gradients(batch, noise)
    # The micro-batch is the fast axis, so that the rows of a device stay on it.
    micro = jax.tree.map(
        lambda x: rearrange(x, "(B M) ... -> M B ...", M=config.optimizer.accumulation),
        (dict(batch), noise),
    )

    def add(total, one):
        return jax.tree.map(jnp.add, total, gradients(*one)), None

    one = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], micro))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, one), micro)[0]
