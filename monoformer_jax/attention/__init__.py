"""Attention under the interval mask: `interval_attention` dispatches to XLA, TPU or GPU kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from monoformer_jax.attention import gpu_kernel, tpu_kernel
from monoformer_jax.attention.dense import EMPTY_LSE, dense_attention
from monoformer_jax.attention.mask import (
    IntervalMask,
    check_mask,
    dense_mask,
    interval_mask,
    mask_area,
    row_masks,
)
from monoformer_jax.errors import require
from monoformer_jax.parallel import BATCH_AXES, TENSOR_AXIS, current_device

__all__ = [
    "EMPTY_LSE",
    "IMPLEMENTATIONS",
    "IntervalMask",
    "check_mask",
    "choose",
    "dense_attention",
    "dense_mask",
    "interval_attention",
    "interval_mask",
    "mask_area",
    "merge",
    "row_masks",
]  # fmt: skip

IMPLEMENTATIONS = ("auto", "dense", "tpu", "gpu")
# Below this many queries (decoding) the score matrix is small and a block would be mostly padding.
SHORTEST_FOR_KERNELS = 128


def interval_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask | tuple[IntervalMask, ...],
    *,
    impl: str = "auto",
    debug_checks: bool = False,
) -> jax.Array:
    """Grouped-query attention in which query l of row b sees the keys [start, stop) of the mask.

    Under `jax.set_mesh` the kernels are sharded over the batch (`parallel.BATCH_AXES`) and the heads
    (`TENSOR_AXIS`); with more than one device and no mesh set they cannot be sharded. Dense
    attention is plain XLA, which partitions it by itself.

    Args:
      q: [B, L, N, H].
      k, v: [B, S, K, H]; N must be a multiple of K.
      mask: ranges over the S keys; required, so that no caller can forget it. A tuple of masks is
        their union: the ranges of one query must not overlap.
      impl: "dense" is plain XLA, "tpu" and "gpu" are the kernels; "auto" selects, see `choose`.
      debug_checks: check the ranges, also under `jit` (slow: it is a host callback).

    Returns:
      [B, L, N, H] in q's dtype; exactly 0 for a query that sees nothing.

    Raises:
      ValueError: incompatible shapes, an unknown `impl`, inputs that the chosen kernel or the mesh
        does not support, or (under `debug_checks`) an invalid mask.
    """
    masks = mask if isinstance(mask, tuple) else (mask,)
    _check_shapes(q, k, v, masks)
    if debug_checks:
        _check_ranges(masks, k.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    device = current_device()
    run = _runner(choose(q, k, impl, device.platform, device.device_kind), device.device_kind)
    if not mesh.empty and run is not dense_attention:
        run = _on_mesh(run, mesh, q, k)
    if run is dense_attention:  # one softmax over the union
        return run(q, k, v, masks)[0]
    parts = [run(q, k, v, one) for one in masks]
    return parts[0][0] if len(parts) == 1 else merge(parts)


def choose(q: jax.Array, k: jax.Array, impl: str, platform: str, chip: str | None = None) -> str:
    """Resolves `impl` on a platform to "dense", "tpu" or "gpu".

    "auto" is the platform's kernel if it supports this head dim, dtype and group size and there are
    at least `SHORTEST_FOR_KERNELS` queries. Otherwise, on a CPU, and on a TPU whose `chip` (its
    `device_kind`) has no block sizes, it is "dense", which materializes the L × S scores.

    Raises:
      InputError: `impl` is the kernel of another platform.
      ValueError: unknown `impl`, or a kernel that does not support this shape or dtype.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    platform = {"cuda": "gpu"}.get(platform, platform)
    require_platform(impl, platform)
    kernels = {"tpu": tpu_kernel, "gpu": gpu_kernel}
    if impl == "auto":
        unknown = platform == "tpu" and chip is not None and chip not in tpu_kernel.TUNING
        if platform not in kernels or unknown or q.shape[1] < SHORTEST_FOR_KERNELS:
            return "dense"
        return "dense" if kernels[platform].unsupported(q, k) else platform
    if impl in kernels and (reason := kernels[impl].unsupported(q, k)):
        raise ValueError(f"attention impl {impl!r}: {reason}")
    return impl


def require_platform(impl: str, platform: str) -> None:
    """Raises InputError if `impl` is the kernel of another platform ("cpu", "tpu" or "gpu")."""
    require(
        impl not in ("tpu", "gpu") or impl == platform,
        f"attention impl {impl!r} cannot run on platform {platform!r}: use 'auto', which selects",
    )


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Merges attention over disjoint key ranges by log-sum-exp; the result is exact.

    Args:
      parts: output [B, L, N, H] and log-sum-exp float32 [B, L, N] over each range; `EMPTY_LSE`
        where a query sees nothing.
    """
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(lses.max(0))
    # An empty range has weight exp(EMPTY_LSE - top) = 0; if all are empty, every output is 0 anyway.
    weights = jnp.exp(lses - top)
    weights = weights / weights.sum(0)
    # As [B, L, N·H], the layout of the kernels; a product with 0 and 1 repeats a weight over a head.
    *shape, heads, dim = parts[0][0].shape
    spread = np.repeat(np.eye(heads, dtype=np.float32), dim, axis=1)
    merged = sum(
        jnp.matmul(weight, spread, precision="highest") * out.reshape(*shape, -1)
        for weight, (out, _) in zip(weights, parts)
    )
    return merged.astype(parts[0][0].dtype).reshape(*shape, heads, dim)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, masks: tuple[IntervalMask, ...]):
    batch, length, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape != v.shape or k.shape != (batch, keys, kv_heads, head_dim):
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} have incompatible shapes")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    if not masks:
        raise ValueError("mask is an empty tuple: a union needs at least one mask")
    for one in masks:
        if one.start.shape != (batch, length) or one.stop.shape != (batch, length):
            raise ValueError(
                f"mask start {one.start.shape} and stop {one.stop.shape} do not match q {q.shape}"
            )


def _check_ranges(masks: tuple[IntervalMask, ...], keys: int) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(masks)):
        jax.debug.callback(lambda *masks: check_mask(masks, keys), *masks)
    else:
        check_mask(masks, keys)


def _runner(impl: str, device_kind: str):
    """Returns (q, k, v, mask) -> (output, log-sum-exp) for a device of this kind."""
    if impl == "tpu":
        return functools.partial(tpu_kernel.tpu_attention, chip=device_kind)
    if impl == "gpu":
        capability = round(10 * float(jax.devices("gpu")[0].compute_capability))
        return functools.partial(gpu_kernel.gpu_attention, capability=capability)
    return dense_attention


def _on_mesh(run, mesh: AbstractMesh, q: jax.Array, k: jax.Array):
    """Shards the kernel over batch and heads: XLA cannot partition a custom call by itself."""
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    rows = 1
    for axis in batch_axes:
        rows *= mesh.shape[axis]
    if q.shape[0] % rows:
        raise ValueError(
            f"mesh axes {batch_axes} have size {rows}: they do not divide the batch of {q.shape[0]}"
        )
    head_axis = TENSOR_AXIS if TENSOR_AXIS in mesh.shape else None
    size = mesh.shape.get(TENSOR_AXIS, 1)
    if k.shape[2] % size:
        raise ValueError(
            f"mesh axis {TENSOR_AXIS!r} has size {size}: it does not divide the {k.shape[2]} "
            "key/value heads"
        )
    array, row = P(batch_axes, None, head_axis, None), P(batch_axes, None)
    return jax.shard_map(
        run,
        in_specs=(array, array, array, row),
        out_specs=(array, P(batch_axes, None, head_axis)),
        check_vma=False,
    )
