"""Interval attention on TPU: the differentiable operation around the two Pallas kernels.

q, k and v keep the layout of the projections, [B, L, N·H], so no heads are transposed; the mask
alone determines which blocks are visited. See `tpu_forward` and `tpu_backward`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas import tpu as pltpu

from monoformer_jax.attention.mask import IntervalMask
from monoformer_jax.attention.tpu_backward import backward, delta
from monoformer_jax.attention.tpu_forward import LANES, Blocks, Heads, forward
from monoformer_jax.attention.vjp import NOTHING, differentiable, natural_lse

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
MAX_STACKED_HEADS = 16
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes for one chip generation, in tokens.

    Args:
      vmem: VMEM per core in bytes.
      rows: stacked rows (heads · queries) per block; a block has at least 128 queries.
      keys: keys per block in bfloat16, half as many in float32; up to a quarter more, in multiples
        of 128, where that divides S. It is the granularity of block skipping.
      wide: keys per unmasked visit, in the forward pass.
    """

    vmem: int
    rows: int
    keys: int
    wide: int


# By `device_kind`, chosen from the bundle counts of `bench attention --static`; `plan_blocks` derives
# the queries per block from `rows` and the number of stacked heads.
_V4 = Tuning(16 * MIB, rows=512, keys=256, wide=512)
_V5P = Tuning(64 * MIB, rows=1024, keys=256, wide=512)
_V5E = Tuning(128 * MIB, rows=1024, keys=256, wide=512)
TUNING = {
    "TPU v4": _V4,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v6 lite": _V5E,
    "TPU v6e": _V5E,
    "TPU7x": _V5P,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of both passes in tokens, and the VMEM that a kernel may use in bytes."""

    queries: int
    keys: int
    wide: int
    chunk_keys: int
    chunk_queries: int
    vmem_limit: int


@dataclasses.dataclass(frozen=True)
class _Static:
    heads: Heads
    plan: Plan
    area: int
    interpret: bool | pltpu.InterpretParams

    def options(self) -> dict:
        """Arguments of both passes other than arrays and blocks."""
        return {
            "heads": self.heads,
            "area": self.area,
            "vmem_limit": self.plan.vmem_limit,
            "interpret": self.interpret,
        }


def fit(size: int, most: int, unit: int) -> tuple[int, int]:
    """Block size of at most `most` tokens, a multiple of `unit`, and `size` padded to full blocks.

    A block that divides the size is preferred if it is at least half of `most`: padding is a copy.
    """
    units, cap = -(-size // unit), max(most // unit, 1)
    block = max(d for d in range(1, cap + 1) if units % d == 0 or d == units)
    if 2 * block < min(cap, units):
        block = cap
    return block * unit, -(-units // block) * block * unit


def plan_blocks(heads: Heads, length: int, keys: int, itemsize: int, chip: str) -> Plan:
    """Block sizes for rows of `length` queries and `keys` keys on a chip.

    Raises:
      ValueError: the chip is not in `TUNING`.
    """
    if chip not in TUNING:
        raise ValueError(f"attention impl 'tpu' has no block sizes for chip {chip!r}")
    tuning = TUNING[chip]
    most = max(tuning.rows // heads.count, LANES)
    queries, _ = fit(length, min(most, 512), LANES)
    # float32 operands take twice the memory.
    narrow = itemsize // 2
    block_keys, padded = fit(keys, tuning.keys // narrow * 5 // 4, LANES)
    # With many stacked heads, the products stay efficient with fewer keys per visit.
    stacked = max(heads.count * queries // tuning.rows, 1)
    wide = max(tuning.wide // narrow // stacked // block_keys, 1) * block_keys
    # Operands and results are double-buffered in half of the VMEM; the rest is for scores.
    lanes = heads.count * heads.dim
    room = tuning.vmem // 2 - 4 * queries * lanes * itemsize  # without the queries and the output
    chunk_keys, _ = fit(padded, room // (4 * heads.width * itemsize), block_keys)
    per_query = lanes * (2 * (2 * itemsize + 4) + 4)  # q, dout, dq; and the dq accumulator
    chunk_queries, _ = fit(length, tuning.vmem // 2 // per_query, queries)
    limit = tuning.vmem * 15 // 16
    return Plan(queries, block_keys, wide, chunk_keys, chunk_queries, limit)


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zero-pads the tokens (axis 1) to a multiple of `block`."""
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x


def _pad_mask(mask: IntervalMask, block: int) -> IntervalMask:
    return IntervalMask(_pad(mask.start, block), _pad(mask.stop, block))


def _run_forward(static: _Static, q, k, v, mask):
    plan, length = static.plan, q.shape[1]
    out, lse = forward(
        _pad(q, plan.queries), _pad(k, plan.chunk_keys), _pad(v, plan.chunk_keys),
        _pad_mask(mask, plan.queries),
        blocks=Blocks(plan.queries, plan.keys, plan.chunk_keys, plan.wide), **static.options(),
    )  # fmt: skip
    heads = static.heads.count
    natural = rearrange(natural_lse(lse), "B J Q 1 (n T) -> B (Q T) (J n)", n=heads)[:, :length]
    return out[:, :length], natural, lse


def _run_backward(static: _Static, q, k, v, mask, out, lse, dout, dlse):
    plan, heads, length = static.plan, static.heads, q.shape[1]
    dlse = _pad(dlse, plan.queries)
    dlse = rearrange(dlse, "B (Q T) (J n) -> B J Q 1 (n T)", T=plan.queries, n=heads.count)
    out, dout = _pad(out, plan.queries), _pad(dout, plan.queries)
    delta_ = delta(out, dout, dlse, heads=heads, interpret=static.interpret)
    missing = -lse.shape[2] % (plan.chunk_queries // plan.queries)
    rows = [(0, 0), (0, 0), (0, missing), (0, 0), (0, 0)]
    lse = jnp.pad(lse, rows, constant_values=NOTHING)
    dq, dk, dv = backward(
        _pad(q, plan.chunk_queries), _pad(k, plan.keys), _pad(v, plan.keys),
        _pad_mask(mask, plan.chunk_queries), lse, jnp.pad(delta_, rows),
        _pad(dout, plan.chunk_queries),
        blocks=Blocks(plan.queries, plan.keys, plan.chunk_queries), **static.options(),
    )  # fmt: skip
    return dq[:, :length], dk[:, : k.shape[1]], dv[:, : v.shape[1]]


# [B, L, N·H], [B, S, K·H] -> output [B, L, N·H] and log-sum-exp float32 [B, L, N].
_attention = differentiable(_run_forward, _run_backward)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernel does not support q [B, L, N, H] and k [B, S, K, H], or None."""
    head_dim, groups = q.shape[3], q.shape[2] // k.shape[2]
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        return f"dtypes {q.dtype} and {k.dtype} are not both bfloat16 or both float32"
    most = MAX_STACKED_HEADS // (2 if head_dim == 64 and k.shape[2] > 1 else 1)
    if groups > most:
        return f"{groups} query heads per key/value head exceed the limit of {most}"
    return None


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask,
    *,
    chip: str,
    area: int | None = None,
    plan: Plan | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over one key range per query; differentiable in both results.

    Args:
      q: [B, L, N, H]. k, v: [B, S, K, H] with N a multiple of K. bfloat16 or float32.
      mask: ranges over the S keys.
      chip: `device_kind` for which block sizes are chosen.
      area: visible (query, key) pairs per row, if known when tracing; used only in the cost
        estimate for XLA's scheduler (default: the pairs of a causal mask).
      plan: replaces the chosen block sizes.
      interpret: run in the Pallas interpreter, on any platform.

    Returns:
      Output [B, L, N, H] in q's dtype and log-sum-exp float32 [B, L, N], as in `dense_attention`.

    Raises:
      ValueError: head dim, dtype, number of heads or chip that the kernel does not support.
    """
    if reason := unsupported(q, k):
        raise ValueError(f"attention impl 'tpu': {reason}")
    (_, length, query_heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    groups, pair = query_heads // kv_heads, 2 if head_dim == 64 and kv_heads > 1 else 1
    if odd := kv_heads % pair:  # one more head of zeros completes the last pair
        q = jnp.pad(q, [(0, 0), (0, 0), (0, odd * groups), (0, 0)])
        k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, odd), (0, 0)]) for x in (k, v))
    heads = Heads(head_dim, groups, pair)
    plan = plan or plan_blocks(heads, length, keys, q.dtype.itemsize, chip)
    area = length * (2 * keys - length + 1) // 2 if area is None and keys >= length else area
    static = _Static(heads, plan, area or length * keys, interpret)
    flat = [rearrange(x, "B T n H -> B T (n H)") for x in (q, k, v)]
    out, lse = _attention(static, *flat, mask)
    out = rearrange(out, "B L (N H) -> B L N H", H=head_dim)
    return out[:, :, :query_heads], lse[..., :query_heads]
