"""The backward pass of interval attention in Pallas for TPU: dq, dk and dv in one kernel.

A grid step holds one key block and visits the query blocks that see it. Everything is transposed
(queries in lanes), so the log-sum-exp is a row vector and needs no shuffles. There are five matrix
products: the recomputed scores, dv, dp, dk and dq. dq is accumulated in VMEM, in float32, until the
last key block has been visited. Rows too long for that are split into chunks of queries, one call
per chunk; dk and dv of the chunks are summed in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from monoformer_jax.attention.mask import (
    BlockBounds,
    IntervalMask,
    key_block_bounds,
    query_block_bounds,
)
from monoformer_jax.attention.tpu_forward import Blocks, Heads, matmul_precision, walk_blocks
from monoformer_jax.attention.vjp import LOG2E

FULL_PER_TURN = 2  # query blocks per iteration of the unmasked loop


def _backward_kernel(
    _chunk_ref, lo_ref, full_lo_ref, full_hi_ref, hi_ref,
    q_ref, dout_ref, k_ref, v_ref, start_ref, stop_ref, lse_ref, delta_ref,
    dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc,
    *, heads: Heads, blocks: Blocks, scale: float,
):  # fmt: skip
    """One key block against one chunk of queries.

    Shapes: q, dout, dq [chunk, count · H]; k, v, dk, dv [bk, width]; start, stop [Q, 1, T];
    lse, delta [Q, 1, R]; scratch: dq [Q, H, R], dk and dv [bk, width]; R = count · T,
    Q = chunk // T.
    """
    block, key_blocks = pl.program_id(2), pl.num_programs(2)
    size, groups = blocks.queries, heads.groups
    dot = functools.partial(
        lax.dot_general,
        precision=matmul_precision(q_ref.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(block == 0)
    def _():
        def clear(i, _):
            dq_acc[i] = jnp.zeros_like(dq_acc[i])

        lax.fori_loop(0, blocks.chunk // size, clear, None)

    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    k, v = k_ref[...], v_ref[...]
    key = block * blocks.keys + lax.broadcasted_iota(jnp.int32, (blocks.keys, 1), 0)

    def visit(i, masked):
        at = pl.ds(pl.multiple_of(i * size, size), size)
        q, dout = heads.stack(q_ref[at, :]), heads.stack(dout_ref[at, :])
        s = dot(k, q, (((1,), (1,)), ((), ()))) * (scale * LOG2E)  # [bk, R]
        p = jnp.exp2(s - lse_ref[i])
        if masked:  # after exp2: fewer bundles than before it, and inf is removed
            start, stop = (jnp.tile(x[i], (1, heads.count)) for x in (start_ref, stop_ref))
            p = jnp.where((key >= start) & (key < stop), p, 0.0)
        dv_acc[...] += dot(p.astype(dout.dtype), dout, (((1,), (0,)), ((), ())))
        dp = dot(v, dout, (((1,), (1,)), ((), ())))
        ds = (p * (dp - delta_ref[i])).astype(q.dtype)  # the scale is applied at the end
        dk_acc[...] += dot(ds, q, (((1,), (0,)), ((), ())))
        dq = dot(k, ds, (((0,), (0,)), ((), ())))  # [width, R]
        if heads.pair == 2:
            half = groups * size
            dq = jnp.concatenate([dq[: heads.dim, :half], dq[heads.dim :, half:]], axis=1)
        dq_acc[i] += dq

    def visit_full(i):
        for j in range(FULL_PER_TURN):
            visit(i + j, masked=False)

    n = pl.program_id(0) * key_blocks + block
    bounds = (r[n] for r in (lo_ref, full_lo_ref, full_hi_ref, hi_ref))
    walk_blocks(bounds, FULL_PER_TURN, lambda i: visit(i, masked=True), visit_full)
    dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(block == key_blocks - 1)
    def _():
        def write(i, _):
            at = pl.ds(pl.multiple_of(i * size, size), size)
            heads_dq = [dq_acc[i, :, n * size : (n + 1) * size] for n in range(heads.count)]
            dq_ref[at, :] = (jnp.concatenate(heads_dq, axis=0).T * scale).astype(dq_ref.dtype)

        lax.fori_loop(0, blocks.chunk // size, write, None)


def _backward_chunk(
    chunk: jax.Array,
    bounds: BlockBounds,
    operands: tuple[jax.Array, ...],
    *,
    heads: Heads,
    blocks: Blocks,
    area: int,
    vmem_limit: int,
    interpret: bool | pltpu.InterpretParams,
    whole: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, chunk, N·H] of one chunk of queries, and its part of dk and dv [B, S, K·H]."""
    q, _, k, *_ = operands
    batch, keys, _ = k.shape
    head_blocks, key_blocks = k.shape[2] // heads.width, keys // blocks.keys
    rows, count = heads.count * blocks.queries, blocks.chunk // blocks.queries
    lanes = heads.count * heads.dim
    query = pl.BlockSpec((None, blocks.chunk, lanes), lambda b, h, j, chunk, *_: (b, chunk[0], h))
    dquery = pl.BlockSpec((None, blocks.chunk, lanes), lambda b, h, j, *_: (b, 0, h))
    key = pl.BlockSpec((None, blocks.keys, heads.width), lambda b, h, j, *_: (b, j, h))
    row = pl.BlockSpec(
        (None, count, 1, blocks.queries), lambda b, h, j, chunk, *_: (b, chunk[0], 0, 0)
    )
    stat = pl.BlockSpec(
        (None, None, count, 1, rows), lambda b, h, j, chunk, *_: (b, h, chunk[0], 0, 0)
    )
    # Parts of dk and dv are summed in float32. dq of a chunk is final, but assembling bfloat16 chunks
    # in a loop crashes libtpu 0.0.51 for Ironwood, which confuses two tilings in this case.
    dtype = q.dtype if whole else jnp.float32
    dkey = jax.ShapeDtypeStruct(k.shape, dtype)
    pairs = batch * area * q.shape[2]
    return pl.pallas_call(
        functools.partial(_backward_kernel, heads=heads, blocks=blocks, scale=heads.dim**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, head_blocks, key_blocks),
            in_specs=[query, query, key, key, row, row, stat, stat],
            out_specs=[dquery, key, key],
            scratch_shapes=[
                pltpu.VMEM((count, heads.dim, rows), jnp.float32),
                pltpu.VMEM((blocks.keys, heads.width), jnp.float32),
                pltpu.VMEM((blocks.keys, heads.width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, blocks.chunk, q.shape[2]), dtype), dkey, dkey],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs,
            transcendentals=pairs // heads.dim,
            bytes_accessed=(3 * q.size + 4 * k.size) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="interval_attention_backward",
    )(chunk, *(x.reshape(-1) for x in bounds), *operands)


def _delta_kernel(out_ref, dout_ref, dlse_ref, delta_ref, *, heads: Heads):
    """Shapes: out, dout [T, count · H]; dlse, delta [1, R]."""
    product = out_ref[...].astype(jnp.float32) * dout_ref[...].astype(jnp.float32)
    delta_ref[...] = heads.stack(product).T.sum(0, keepdims=True) - dlse_ref[...]


def delta(
    out: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    heads: Heads,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Σ_H out · dout - dlse, the row term that the softmax gradient subtracts from dp.

    A separate kernel, because XLA would first copy the product into another layout.

    Args:
      out, dout: [B, L, N·H].
      dlse: gradient of the natural log-sum-exp, float32 [B, head blocks, L // T, 1, R].

    Returns:
      Array with the shape of `dlse`.
    """
    batch, head_blocks, query_blocks, _, rows = dlse.shape
    size = rows // heads.count
    query = pl.BlockSpec((None, size, heads.count * heads.dim), lambda b, h, i: (b, i, h))
    stat = pl.BlockSpec((None, None, None, 1, rows), lambda b, h, i: (b, h, i, 0, 0))
    return pl.pallas_call(
        functools.partial(_delta_kernel, heads=heads),
        grid=(batch, head_blocks, query_blocks),
        in_specs=[query, query, stat],
        out_specs=stat,
        out_shape=jax.ShapeDtypeStruct(dlse.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="interval_attention_delta",
    )(out, dout, dlse)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    heads: Heads,
    blocks: Blocks,
    **options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of interval attention.

    Args:
      q, dout: [B, L, N·H]. k, v: [B, S, K·H]. L and S are multiples of `blocks.chunk` and
        `blocks.keys`.
      mask: [B, L].
      lse: from `forward`, in rows of `blocks.queries` tokens: [B, head blocks, L // T, 1, R].
      delta: see `delta`; same shape as `lse`.
      heads, blocks: layout of a grid step.
      **options: area, vmem_limit and interpret, see `forward`.

    Returns:
      dq, dk, dv with the shapes and dtypes of q, k and v.
    """
    batch, length, _ = q.shape
    chunks, count = length // blocks.chunk, blocks.chunk // blocks.queries
    rows = (batch, length // blocks.queries, 1, blocks.queries)
    operands = (q, dout, k, v, mask.start.reshape(rows), mask.stop.reshape(rows), lse, delta)
    bounds = key_block_bounds(mask, blocks.queries, blocks.keys)
    key_blocks = k.shape[1] // blocks.keys
    options |= {"heads": heads, "blocks": blocks, "whole": chunks == 1}
    if chunks == 1:
        bounds = query_block_bounds(bounds, key_blocks)
        return _backward_chunk(jnp.zeros(1, jnp.int32), bounds, operands, **options)

    def step(sums, inputs):
        chunk, bounds = inputs
        bounds = query_block_bounds(bounds, key_blocks)
        part, *parts = _backward_chunk(chunk[None], bounds, operands, **options)
        dq = lax.dynamic_update_slice_in_dim(sums[0], part, chunk * blocks.chunk, axis=1)
        return (dq, *(a + b for a, b in zip(sums[1:], parts))), None

    per_chunk = [x.reshape(batch, chunks, count).swapaxes(0, 1) for x in bounds]
    inputs = (jnp.arange(chunks, dtype=jnp.int32), BlockBounds(*per_chunk))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = lax.scan(step, zeros, inputs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
