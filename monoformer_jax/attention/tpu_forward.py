"""The forward pass of interval attention in Pallas for TPU.

A grid step holds one query block of all heads that share a key/value block, and one chunk of keys
and values (all S of them if they fit into VMEM). The heads are stacked as rows, so keys are loaded
once per group. The lanes of the scores are keys; the running maximum and sum are replicated over
the 128 lanes, which costs memory but needs no shuffles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from monoformer_jax.attention.mask import IntervalMask, key_block_bounds
from monoformer_jax.attention.vjp import LOG2E, NOTHING

LANES = 128
MASKED = -1e30
# Above MASKED, so that exp2(MASKED - maximum) is 0 for a query that has seen no key yet.
LOWEST = -1e29


@dataclasses.dataclass(frozen=True)
class Heads:
    """Layout of the heads in a lane block.

    Args:
      dim: head dim H.
      groups: query heads per key/value head, G.
      pair: key/value heads per lane block: 2 if H is 64 (a block has at least 128 lanes) and there
        is more than one, else 1.
    """

    dim: int
    groups: int
    pair: int

    @property
    def width(self) -> int:
        """Lanes of a key or value block."""
        return self.pair * self.dim

    @property
    def count(self) -> int:
        """Query heads per block, stacked as rows of one matrix product."""
        return self.pair * self.groups

    def stack(self, block: jax.Array) -> jax.Array:
        """[T, count · H] -> [count · T, width]: stacks the heads as rows.

        In a pair each query head has zeros in the lanes of the other key/value head, so a product
        with the pair uses only its own one. This costs only lanes that a 64-wide operand would
        leave idle anyway.
        """
        heads = []
        for n in range(self.count):
            head = block[:, n * self.dim : (n + 1) * self.dim]
            if self.pair == 2:
                zeros = jnp.zeros_like(head)
                parts = [head, zeros] if n < self.groups else [zeros, head]
                head = jnp.concatenate(parts, axis=1)
            heads.append(head)
        return jnp.concatenate(heads, axis=0)

    def unstack(self, rows: jax.Array) -> jax.Array:
        """[count · T, width] -> [T, count · H], reading each head from its own lanes."""
        size = rows.shape[0] // self.count
        heads = []
        for n in range(self.count):
            lane = n // self.groups * self.dim
            heads.append(rows[n * size : (n + 1) * size, lane : lane + self.dim])
        return jnp.concatenate(heads, axis=1)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Query block size, key block size, and tokens that stay in VMEM at once.

    `chunk` counts keys in the forward pass and queries in the backward pass; it is a multiple of
    that side's block size. `wide`, a multiple of `keys`, is how many keys an unmasked visit of the
    forward pass takes: small blocks skip more, wide ones use the matrix units better.
    """

    queries: int
    keys: int
    chunk: int
    wide: int = 0

    @property
    def per_turn(self) -> int:
        """Key blocks per iteration of the forward pass's unmasked loop."""
        return 2 * self.wide // self.keys


def replicate(x: jax.Array, width: int) -> jax.Array:
    """[R, 128] with equal lanes -> [R, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))


def walk_blocks(
    bounds: Iterable[jax.Array],
    per_turn: int,
    edge: Callable[[jax.Array], None],
    full: Callable[[jax.Array], None],
) -> None:
    """Calls `full` with the first of every `per_turn` fully visible blocks, `edge` with the rest.

    Two or more visits per loop body let the compiler overlap the softmax of one with the products
    of another, which a loop of single visits does not allow. So the blocks before and after the
    full ones form one list, visited in pairs.

    Args:
      bounds: lo <= full_lo <= full_hi <= hi; blocks are [lo, hi), the full ones [full_lo, full_hi).
    """
    lo, full_lo, full_hi, hi = bounds
    turns = lax.div(full_hi - full_lo, per_turn)
    skipped = turns * per_turn
    edges = hi - lo - skipped
    pairs = lax.div(edges, 2)

    def one(i, _):
        block = lo + i
        edge(jnp.where(block < full_lo, block, block + skipped))

    def two(i, _):
        one(2 * i, None)
        one(2 * i + 1, None)

    lax.fori_loop(0, pairs, two, None)
    lax.fori_loop(2 * pairs, edges, one, None)
    lax.fori_loop(0, turns, lambda i, _: full(full_lo + i * per_turn), None)


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32 operands; the default would round them to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _forward_kernel(
    lo_ref, full_lo_ref, full_hi_ref, hi_ref, q_ref, k_ref, v_ref, start_ref, stop_ref,
    out_ref, lse_ref, max_ref, sum_ref, acc_ref, start_col, stop_col,
    *, heads: Heads, blocks: Blocks, scale: float,
):  # fmt: skip
    """One query block against one chunk of keys.

    Shapes: q, out [T, count · H]; k, v [chunk, width]; start, stop [1, T]; lse [1, R] in base 2;
    scratch: max, sum [R, 128], acc [R, width], columns [T, 128]; R = count · T.
    """
    chunk, chunks = pl.program_id(3), pl.num_programs(3)
    rows, bk = heads.count * blocks.queries, blocks.keys
    precision = matmul_precision(q_ref.dtype)
    q = heads.stack(q_ref[...])

    @pl.when(chunk == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for row, col in ((start_ref, start_col), (stop_ref, stop_col)):
            col[...] = jnp.broadcast_to(row[...], (LANES, blocks.queries)).T

    def visit(block, width, masked):
        """Adds `width` keys to the softmax, from `block` on, counted from the row's first block."""
        at = pl.ds(pl.multiple_of(block * bk - chunk * blocks.chunk, bk), width)
        k, v = k_ref[at, :], v_ref[at, :]
        s = lax.dot_general(
            q, k, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        s = s * (scale * LOG2E)
        if masked:
            key = block * bk + lax.broadcasted_iota(jnp.int32, (blocks.queries, width), 1)
            start, stop = (replicate(x[...], width) for x in (start_col, stop_col))
            s = s.reshape(heads.count, blocks.queries, width)
            s = jnp.where(((key >= start) & (key < stop))[None], s, MASKED).reshape(rows, width)
        before = max_ref[...]
        top = jnp.maximum(before, s.max(1)[:, None])
        p = jnp.exp2(s - replicate(top, width))
        decay = jnp.exp2(before - top)
        sum_ref[...] = decay * sum_ref[...] + p.sum(1)[:, None]
        max_ref[...] = top
        seen_values = lax.dot_general(
            p.astype(v.dtype), v, (((1,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        acc_ref[...] = replicate(decay, heads.width) * acc_ref[...] + seen_values

    def visit_full(block):
        visit(block, blocks.wide, masked=False)
        visit(block + blocks.wide // bk, blocks.wide, masked=False)

    n = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    first = chunk * (blocks.chunk // bk)
    bounds = (
        jnp.clip(ref[n], first, first + blocks.chunk // bk)
        for ref in (lo_ref, full_lo_ref, full_hi_ref, hi_ref)
    )
    walk_blocks(bounds, blocks.per_turn, lambda block: visit(block, bk, masked=True), visit_full)

    @pl.when(chunk == chunks - 1)
    def _():
        total = sum_ref[...]
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        out = acc_ref[...] * replicate(jnp.where(seen, 1.0 / safe, 0.0), heads.width)
        out_ref[...] = heads.unstack(out).astype(out_ref.dtype)
        lse = jnp.where(seen, max_ref[...] + jnp.log2(safe), NOTHING)
        lse_ref[...] = lse.T[:1, :]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask,
    *,
    heads: Heads,
    blocks: Blocks,
    area: int,
    vmem_limit: int,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Attention over one key range per query.

    Args:
      q: [B, L, N·H]. k, v: [B, S, K·H]. L and S are multiples of `blocks.queries` and
        `blocks.chunk`.
      mask: [B, L].
      heads, blocks: layout of a grid step.
      area: visible (query, key) pairs per row, for XLA's scheduler only.
      vmem_limit: bytes of VMEM that the kernel may use.
      interpret: run in the Pallas interpreter.

    Returns:
      Output [B, L, N·H] in q's dtype and the log-sum-exp in base 2, in the kernels' layout: float32
      [B, head blocks, L // T, 1, R] with R = count · T rows, NOTHING if a query sees nothing.
    """
    batch, length, _ = q.shape
    keys = k.shape[1]
    head_blocks, query_blocks = k.shape[2] // heads.width, length // blocks.queries
    rows, chunks, per_chunk = (
        heads.count * blocks.queries, keys // blocks.chunk, blocks.chunk // blocks.keys,
    )  # fmt: skip
    bounds = [x.reshape(-1) for x in key_block_bounds(mask, blocks.queries, blocks.keys)]

    def key_index(b, h, i, c, lo_ref, full_lo_ref, full_hi_ref, hi_ref):
        # A chunk that the queries do not see repeats a neighbour's index, so nothing is fetched.
        if chunks == 1:
            return b, 0, h
        n = b * query_blocks + i
        last = lax.div(jnp.maximum(hi_ref[n] - 1, lo_ref[n]), per_chunk)
        return b, jnp.minimum(jnp.clip(c, lax.div(lo_ref[n], per_chunk), last), chunks - 1), h

    query = pl.BlockSpec(
        (None, blocks.queries, heads.count * heads.dim), lambda b, h, i, c, *_: (b, i, h)
    )
    key = pl.BlockSpec((None, blocks.chunk, heads.width), key_index)
    row = pl.BlockSpec((None, 1, blocks.queries), lambda b, h, i, c, *_: (b, 0, i))
    lse = pl.BlockSpec((None, None, None, 1, rows), lambda b, h, i, c, *_: (b, h, i, 0, 0))
    pairs = batch * area * q.shape[2]
    return pl.pallas_call(
        functools.partial(_forward_kernel, heads=heads, blocks=blocks, scale=heads.dim**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, head_blocks, query_blocks, chunks),
            in_specs=[query, key, key, row, row],
            out_specs=[query, lse],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, heads.width), jnp.float32),
                pltpu.VMEM((blocks.queries, LANES), jnp.int32),
                pltpu.VMEM((blocks.queries, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, head_blocks, query_blocks, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs,
            transcendentals=pairs // heads.dim,
            bytes_accessed=(2 * q.size + k.size + v.size) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="interval_attention_forward",
    )(*bounds, q, k, v, mask.start[:, None], mask.stop[:, None])
