"""Where every array lives: the device mesh, one rules table, and shardings made from both.

Parameters carry logical axis names; `RULES` maps them to the mesh axes data, fsdp and tensor. A name
without a rule and a dimension that does not divide are errors, never silently replicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import require

AXES = ("data", "fsdp", "tensor")
DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)

# Logical axis of a parameter -> mesh axis. fsdp cuts the width of every matrix, tensor what a block
# computes independently: heads, mlp columns, vocabulary.
RULES: dict[str | None, str | None] = {
    "layers": None,
    "norm": None,
    "embed": "fsdp",
    "embed_out": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}
BATCH = PartitionSpec(BATCH_AXES)  # of arrays [B, …]


def make_mesh(c: MeshConfig, devices: list | None = None) -> Mesh:
    """Mesh of all devices over (data, fsdp, tensor).

    Neighbours along an axis are neighbours on the network; with several slices, runs of the data axis
    are whole slices, so that fsdp and tensor stay inside them.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or do not suit its slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [c.data, c.fsdp, c.tensor]
    free = [i for i, size in enumerate(sizes) if size == -1]
    given = f"mesh data={c.data}, fsdp={c.fsdp}, tensor={c.tensor}"
    require(len(free) <= 1 and all(s > 0 or s == -1 for s in sizes),
            f"{given}: sizes are above 0, and at most one is -1")  # fmt: skip
    known = int(np.prod([size for size in sizes if size != -1]))
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    require(int(np.prod(sizes)) == len(devices), f"{given} does not fit {len(devices)} devices")
    # Hosts of GPUs have the attribute too, but NVIDIA's libraries know the way between them.
    of_tpu = [getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices]
    slices = len(set(of_tpu))
    require(c.slices == slices, f"mesh.slices={c.slices}, but the devices are in {slices}")
    require(
        sizes[0] % slices == 0, f"mesh.data={sizes[0]} is not a multiple of its {slices} slices"
    )
    types = (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=types)


def parameter_shardings(axes: Mapping, shapes: Mapping, mesh: Mesh) -> dict:
    """Sharding of every parameter.

    Args:
      axes: tree of tuples of logical names, see `monoformer.logical_axes`.
      shapes: tree of arrays or ShapeDtypeStructs.
      mesh: see `make_mesh`.

    Raises:
      ValueError: a name without a rule, or a dimension that its mesh axis does not divide.
    """

    def place(path, shape, names):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for name, size in zip(names, shape.shape, strict=True):
            if name not in RULES:
                raise ValueError(f"parameter {where}: no rule for its axis {name!r}")
            over = RULES[name]
            if over and size % mesh.shape[over]:
                raise ValueError(
                    f"parameter {where}: its axis {name} of {size} is not divisible by "
                    f"mesh.{over}={mesh.shape[over]}"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def abstract_params(axes: Mapping, shapes: Mapping, mesh: Mesh) -> dict:
    """`shapes` as ShapeDtypeStructs with the shardings of `parameter_shardings`."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        parameter_shardings(axes, shapes, mesh),
    )


def use_mesh(mesh: Mesh | None):
    """Context in which arrays are divided over the mesh; without one nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, cut over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def check_batch_size(batch_size: int, grad_accum_steps: int, mesh: Mesh) -> None:
    """Raises InputError where a micro-batch cannot be cut evenly over the devices."""
    over = batch_shards(mesh)
    require(
        batch_size % (grad_accum_steps * over) == 0,
        f"batch_size={batch_size} is not a multiple of optimizer.grad_accum_steps={grad_accum_steps} "
        f"times the {over} devices along data and fsdp",
    )


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Rows of the global batch that the devices of this process hold, in ascending order."""
    sharding = NamedSharding(mesh, PartitionSpec(*BATCH[:1]))
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in places for row in range(*part.indices(batch_size))})
