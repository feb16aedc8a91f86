"""The trained model that sampling uses, and its placement on devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from monoformer_jax import batch as contract
from monoformer_jax.config import Config, MeshConfig
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import abstract_params, get_model
from monoformer_jax.parallel import abstract_arrays, bytes_on_device, make_mesh
from monoformer_jax.runtime.compiler import compiler_options

IMAGES, PROMPT = 8, 64  # per data shard: images in a batch, and tokens per prompt
SPARE = 0.9  # fraction of memory for weights and cache; the rest is for activations


@dataclasses.dataclass
class Sampler:
    """A trained model with its config, tokenizer and mesh.

    Attributes:
      config: config of the run that trained the model.
      params: parameters, sharded by `parallel.RULES` if there is a mesh.
      tokenizer: see `data.tokenizer.open_tokenizer`.
      mesh: batches are sharded over its data and fsdp axes; None: a single device.
    """

    config: Config
    params: dict = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    mesh: Mesh | None = None

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options that denoising is compiled with, see `runtime.compiler`."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return compiler_options(self.config.compiler_options, device)


def abstract_weights(c: Any, dtype: str, mesh: Mesh) -> dict:
    """Parameters of a model as ShapeDtypeStructs, in `dtype`, with their shardings.

    Raises:
      ValueError: a parameter dimension is not divisible by its mesh axis.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(c))
    return abstract_arrays(get_model(c).logical_axes(c), shapes, mesh)


def abstract_state(config: Config, rows: int, slots: int, mesh: Mesh) -> Any:
    """The decoding state after prompts of `slots` tokens, as ShapeDtypeStructs with shardings."""
    c, model = config.model, get_model(config.model)
    block = contract.spec(config.layout, rows, slots)
    state = jax.eval_shape(
        lambda params, block: model.extend(c, params, model.init_state(c, rows), block, slots),
        abstract_params(c), block,
    )  # fmt: skip
    return abstract_arrays(state.logical_axes(), state, mesh)


def sampling_mesh(
    config: Config, devices: list[jax.Device], dtype: str, memory: float | None = None
) -> Mesh:
    """Returns the mesh with the smallest `tensor` axis that fits weights and cache; the rest is `data`.

    Args:
      devices: devices to sample on.
      dtype: dtype of the weights.
      memory: bytes per device; default: what the devices report, or unlimited if they report
        nothing.

    Raises:
      InputError: the model fits on no mesh of these devices.
    """
    stats = getattr(devices[0], "memory_stats", lambda: None)() if memory is None else None
    memory = memory or (stats or {}).get("bytes_limit")
    if memory is None:
        return make_mesh(MeshConfig(data=-1), devices)
    needed = float("nan")
    for tensor in (n for n in range(1, len(devices) + 1) if len(devices) % n == 0):
        mesh = make_mesh(MeshConfig(data=-1, tensor=tensor), devices)
        rows = 2 * IMAGES * (len(devices) // tensor)  # the conditional and unconditional branches
        try:
            weights = abstract_weights(config.model, dtype, mesh)
            state = abstract_state(config, rows, PROMPT + config.image_tokens, mesh)
        except ValueError:  # heads or vocabulary are not divisible
            continue
        needed = bytes_on_device((weights, state))
        if needed <= SPARE * memory:
            return mesh
    raise InputError(
        f"the weights in {dtype} and a cache need {needed / 2**30:.1f} GiB on each of "
        f"{len(devices)} devices, which have {memory / 2**30:.1f}: use more devices, or bfloat16"
    )
