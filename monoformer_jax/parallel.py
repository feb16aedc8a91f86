"""Sharding: the device mesh, the logical axis rules, and the shardings derived from both.

Parameters have logical axis names; `RULES` maps them to the mesh axes data, fsdp and tensor. A name
without a rule or a dimension that is not divisible is an error, and is never silently replicated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError, require

AXES = ("data", "fsdp", "tensor")
DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)

# Logical axis of a parameter or of a decoding state -> mesh axis. fsdp shards the embed dimension of
# every matrix; tensor shards heads, mlp columns and vocabulary.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
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
BATCH = PartitionSpec(BATCH_AXES)  # for arrays [B, …]


def make_mesh(c: MeshConfig, devices: list | None = None) -> Mesh:
    """Returns the mesh of all devices over (data, fsdp, tensor).

    Devices are ordered so that neighbours along an axis are neighbours on the network; with several
    slices, only the data axis spans slices.

    Raises:
      InputError: the product of the sizes is not the number of devices, or they do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [c.data, c.fsdp, c.tensor]
    free = [i for i, size in enumerate(sizes) if size == -1]
    given = f"mesh data={c.data}, fsdp={c.fsdp}, tensor={c.tensor}"
    require(len(free) <= 1 and all(s > 0 or s == -1 for s in sizes),
            f"{given}: sizes must be above 0, and at most one may be -1")  # fmt: skip
    known = int(np.prod([size for size in sizes if size != -1]))
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    require(int(np.prod(sizes)) == len(devices), f"{given} does not fit {len(devices)} devices")
    slices = count_slices(devices)
    require(c.slices == slices, f"mesh.slices={c.slices}, but the devices are in {slices} slices")
    require(
        sizes[0] % slices == 0, f"mesh.data={sizes[0]} is not a multiple of mesh.slices={slices}"
    )
    types = (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=types)


def count_slices(devices: list) -> int:
    """Number of TPU slices of the devices."""
    # GPU devices also have slice_index (the host), but NCCL handles the topology.
    return len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices})


def fitting_layout(
    axes: Any, shapes: Any, c: MeshConfig, devices: list, batch_size: int, micro: int, streams: int
) -> tuple[MeshConfig, int] | None:
    """The mesh and batch size closest to the wanted ones that fit the devices; None if none does.

    Args:
      axes, shapes: see `logical_shardings`.
      c: the mesh that is wanted.
      batch_size: the batch size that is wanted; it is raised if no mesh divides it.
      micro: micro-batches of a step, `optimizer.grad_accum_steps`.
      streams: `data.streams`.
    """
    count, slices = len(devices), count_slices(devices)

    def cost(layout):
        mesh, rows = layout
        wanted = [(c.data, mesh.data), (c.tensor, mesh.tensor)]
        return rows, sum(abs(math.log(have / want)) for want, have in wanted if want > 0)

    found = []
    for tensor in (n for n in range(1, count + 1) if count % n == 0):
        for data in range(slices, count // tensor + 1, slices):
            sizes = {"data": data, "fsdp": count // tensor // data, "tensor": tensor}
            if math.prod(sizes.values()) != count or next(_misfits(axes, shapes, sizes), None):
                continue
            unit = math.lcm(micro * data * sizes["fsdp"], streams)
            found.append((MeshConfig(**sizes, slices=slices), -(-batch_size // unit) * unit))
    return min(found, key=cost, default=None)


def _misfits(axes: Any, shapes: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Dimensions that are not divisible by their mesh axes, as a message each."""
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, names), shape in zip(named, jax.tree.leaves(shapes), strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for name, size in zip(names, shape.shape, strict=True):
            if name not in RULES:
                raise ValueError(f"parameter {where}: no rule for its axis {name!r}")
            over = RULES[name] or ()
            over = (over,) if isinstance(over, str) else over
            if size % math.prod(sizes[axis] for axis in over):
                given = " times ".join(f"mesh.{axis}={sizes[axis]}" for axis in over)
                yield f"parameter {where}: its axis {name} of {size} is not divisible by {given}"


def logical_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a tree.

    Args:
      axes: tree of tuples of logical names, see `RULES`.
      shapes: tree of arrays or ShapeDtypeStructs.
      mesh: see `make_mesh`.

    Raises:
      InputError: a dimension that is not divisible by its mesh axes.
      ValueError: a name without a rule.
    """

    for misfit in _misfits(axes, shapes, mesh.shape):
        raise InputError(misfit)

    def place(shape, names):
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree.map(place, shapes, axes)


def abstract_arrays(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """`shapes` as ShapeDtypeStructs with the shardings of `logical_shardings`."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        logical_shardings(axes, shapes, mesh),
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes per device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def constrain(tree: Any, axes: Any) -> Any:
    """Adds sharding constraints by logical axes inside jit, if a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def place(x, names):
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree.map(place, tree, axes)


def describe_mesh(mesh: Mesh) -> str:
    """Formats a mesh, such as "data=2, fsdp=1, tensor=4"."""
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def current_device():
    """The device that a program is traced for: of the mesh that is set, else of this process.

    In ahead-of-time compilation the mesh's devices are not those of jax.devices().
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty else mesh.abstract_device


def use_mesh(mesh: Mesh | None):
    """Context manager that sets the mesh; a no-op if it is None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def tensor_shards() -> int:
    """Number of shards of heads and columns in the mesh that is set; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(TENSOR_AXIS, 1)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch axis."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def padded_rows(rows: int, mesh: Mesh | None) -> int:
    """Rounds `rows` up to a multiple of the batch shards; without a mesh returns it unchanged."""
    return rows if mesh is None else -(-rows // batch_shards(mesh)) * batch_shards(mesh)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Converts this process's rows of a batch to global arrays, sharded over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def spread_batch(tree: Any, mesh: Mesh) -> Any:
    """Shards arrays [B, …] that every process holds whole over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(put, tree)


def to_host(tree: Any) -> Any:
    """Copies arrays to the host, whole ones in every process; in several processes all must call it."""

    def copy(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(copy, tree)


def check_batch_size(batch_size: int, grad_accum_steps: int, mesh: Mesh) -> None:
    """Raises InputError if a micro-batch cannot be sharded evenly over the devices."""
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
