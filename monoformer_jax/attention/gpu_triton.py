"""The Triton kernels of interval attention: forward, dq, and dk with dv.

This module imports only triton, so the kernels can be compiled and run interpreted on a machine
without a GPU. Arrays are q, out [B, L, N, H], k, v [B, S, K, H], start and stop [B, L], bounds
[4, B, blocks], and lse, delta float32 [B, N, L], lse in base 2. Upper-case arguments are
compile-time constants; QB and KB are the query and key block sizes in tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As in the TPU kernels: MASKED < LOWEST makes exp2 of a masked score 0 before any key was seen, and
# NOTHING, the log-sum-exp of a query that sees nothing, does the same in the backward pass.
MASKED = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-1e29)
NOTHING = tl.constexpr(1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bounds(bounds, row, block, B: tl.constexpr, BLOCKS: tl.constexpr):
    """Loads lo, full_lo, full_hi, hi of one block of one row."""
    at = bounds + row * BLOCKS + block
    step: tl.constexpr = B * BLOCKS
    return tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step)


@triton.jit
def _tile(base, token, TOKENS: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
          DOT: tl.constexpr, GUARD: tl.constexpr):  # fmt: skip
    """Loads the rows `token` of one head as [tokens, H] in dtype DOT; with GUARD, 0 past the end."""
    at = base + token[:, None] * STRIDE + tl.arange(0, H)[None, :]
    if GUARD:
        return tl.load(at, mask=token[:, None] < TOKENS, other=0.0).to(DOT)
    return tl.load(at).to(DOT)


@triton.jit
def _seen(start, stop, key):
    """Whether each query [QB] sees each key [KB]: bool [QB, KB]."""
    return (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])


@triton.jit
def _forward_blocks(
    acc, total, top, q, k_base, v_base, start, stop, lo, hi,
    S: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, KB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the key blocks [lo, hi) to the running softmax; the mask is applied only if EDGE."""
    scale: tl.constexpr = LOG2E / H**0.5
    for block in range(lo, hi):
        key = block * KB + tl.arange(0, KB)
        k = _tile(k_base, key, S, STRIDE, H, DOT, EDGE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if EDGE:
            s = tl.where(_seen(start, stop, key), s, MASKED)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        top = higher
        v = _tile(v_base, key, S, STRIDE, H, DOT, EDGE)
        acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit
def forward_kernel(
    q, k, v, start, stop, bounds, out, lse,
    B: tl.constexpr, L: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one block of queries of one head; grid (blocks, B · N)."""
    block, row, head = tl.program_id(0), tl.program_id(1) // N, tl.program_id(1) % N
    wide = row.to(tl.int64)  # offsets in an array can exceed 2^31
    token = block * QB + tl.arange(0, QB)
    inside = token < L
    first = tl.load(start + row * L + token, mask=inside, other=0)
    last = tl.load(stop + row * L + token, mask=inside, other=0)
    tile = _tile(q + wide * L * N * H + head * H, token, L, N * H, H, DOT, True)
    k_base = k + wide * S * K * H + head // (N // K) * H
    v_base = v + wide * S * K * H + head // (N // K) * H
    # Not tl.cdiv: in Triton 3.6 its result is not a constant.
    lo, full_lo, full_hi, hi = _bounds(bounds, row, block, B, (L + QB - 1) // QB)
    acc = tl.zeros((QB, H), tl.float32)
    total = tl.zeros((QB,), tl.float32)
    top = tl.full((QB,), LOWEST, tl.float32)
    acc, total, top = _forward_blocks(
        acc, total, top, tile, k_base, v_base, first, last, lo, full_lo,
        S, K * H, H, KB, DOT, PRECISION, True,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, tile, k_base, v_base, first, last, full_lo, full_hi,
        S, K * H, H, KB, DOT, PRECISION, False,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, tile, k_base, v_base, first, last, full_hi, hi,
        S, K * H, H, KB, DOT, PRECISION, True,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    acc = acc / safe[:, None]
    at = out + wide * L * N * H + head * H + token[:, None] * (N * H) + tl.arange(0, H)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None])
    value = tl.where(total > 0, top + tl.log2(safe), NOTHING)
    tl.store(lse + (wide * N + head) * L + token, value, mask=inside)


@triton.jit
def _dq_blocks(
    dq, q, dout, top, shift, k_base, v_base, start, stop, lo, hi,
    S: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, KB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the key blocks [lo, hi) to dq, without the softmax scale."""
    scale: tl.constexpr = LOG2E / H**0.5
    for block in range(lo, hi):
        key = block * KB + tl.arange(0, KB)
        k = _tile(k_base, key, S, STRIDE, H, DOT, EDGE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if EDGE:
            s = tl.where(_seen(start, stop, key), s, MASKED)
        p = tl.exp2(s - top[:, None])
        v = _tile(v_base, key, S, STRIDE, H, DOT, EDGE)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - shift[:, None])).to(DOT)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, start, stop, bounds, lse, delta, dq,
    B: tl.constexpr, L: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head; grid (blocks, B · N)."""
    block, row, head = tl.program_id(0), tl.program_id(1) // N, tl.program_id(1) % N
    wide = row.to(tl.int64)
    token = block * QB + tl.arange(0, QB)
    inside = token < L
    first = tl.load(start + row * L + token, mask=inside, other=0)
    last = tl.load(stop + row * L + token, mask=inside, other=0)
    top = tl.load(lse + (wide * N + head) * L + token, mask=inside, other=NOTHING)
    shift = tl.load(delta + (wide * N + head) * L + token, mask=inside, other=0.0)
    tile = _tile(q + wide * L * N * H + head * H, token, L, N * H, H, DOT, True)
    dtile = _tile(dout + wide * L * N * H + head * H, token, L, N * H, H, DOT, True)
    k_base = k + wide * S * K * H + head // (N // K) * H
    v_base = v + wide * S * K * H + head // (N // K) * H
    lo, full_lo, full_hi, hi = _bounds(bounds, row, block, B, (L + QB - 1) // QB)
    acc = tl.zeros((QB, H), tl.float32)
    acc = _dq_blocks(acc, tile, dtile, top, shift, k_base, v_base, first, last, lo, full_lo,
                     S, K * H, H, KB, DOT, PRECISION, True)  # fmt: skip
    acc = _dq_blocks(acc, tile, dtile, top, shift, k_base, v_base, first, last, full_lo, full_hi,
                     S, K * H, H, KB, DOT, PRECISION, False)  # fmt: skip
    acc = _dq_blocks(acc, tile, dtile, top, shift, k_base, v_base, first, last, full_hi, hi,
                     S, K * H, H, KB, DOT, PRECISION, True)  # fmt: skip
    at = dq + wide * L * N * H + head * H + token[:, None] * (N * H) + tl.arange(0, H)[None, :]
    tl.store(at, (acc * H**-0.5).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, key, q_base, dout_base, lse_base, delta_base, start_base, stop_base, lo, hi,
    L: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, QB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the query blocks [lo, hi) of one head to dk (without the scale) and dv; [keys, H]."""
    scale: tl.constexpr = LOG2E / H**0.5
    for block in range(lo, hi):
        token = block * QB + tl.arange(0, QB)
        q = _tile(q_base, token, L, STRIDE, H, DOT, EDGE)
        dout = _tile(dout_base, token, L, STRIDE, H, DOT, EDGE)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        inside = token < L
        top = tl.load(lse_base + token, mask=inside, other=NOTHING)
        shift = tl.load(delta_base + token, mask=inside, other=0.0)
        if EDGE:
            start = tl.load(start_base + token, mask=inside, other=0)
            stop = tl.load(stop_base + token, mask=inside, other=0)
            seen = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
            s = tl.where(seen, s, MASKED)
        p = tl.exp2(s - top[None, :])
        dv = tl.dot(p.to(DOT), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - shift[None, :])).to(DOT)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q, k, v, dout, start, stop, bounds, lse, delta, dk, dv,
    B: tl.constexpr, L: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head; grid (blocks, B · K).

    One program visits all query heads of the group, so there are no atomic adds and the result is
    deterministic.
    """
    block, row, kv_head = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    wide = row.to(tl.int64)
    key = block * KB + tl.arange(0, KB)
    offset = wide * S * K * H + kv_head * H
    k_tile = _tile(k + offset, key, S, K * H, H, DOT, True)
    v_tile = _tile(v + offset, key, S, K * H, H, DOT, True)
    lo, full_lo, full_hi, hi = _bounds(bounds, row, block, B, (S + KB - 1) // KB)
    dk_acc = tl.zeros((KB, H), tl.float32)
    dv_acc = tl.zeros((KB, H), tl.float32)
    for group in range(N // K):
        head = kv_head * (N // K) + group
        q_base = q + wide * L * N * H + head * H
        dout_base = dout + wide * L * N * H + head * H
        lse_base, delta_base = lse + (wide * N + head) * L, delta + (wide * N + head) * L
        start_base, stop_base = start + row * L, stop + row * L
        dk_acc, dv_acc = _dkv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, key, q_base, dout_base, lse_base, delta_base,
            start_base, stop_base, lo, full_lo, L, N * H, H, QB, DOT, PRECISION, True,
        )  # fmt: skip
        dk_acc, dv_acc = _dkv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, key, q_base, dout_base, lse_base, delta_base,
            start_base, stop_base, full_lo, full_hi, L, N * H, H, QB, DOT, PRECISION, False,
        )  # fmt: skip
        dk_acc, dv_acc = _dkv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, key, q_base, dout_base, lse_base, delta_base,
            start_base, stop_base, full_hi, hi, L, N * H, H, QB, DOT, PRECISION, True,
        )  # fmt: skip
    at = offset + key[:, None] * (K * H) + tl.arange(0, H)[None, :]
    inside = key[:, None] < S
    tl.store(dk + at, (dk_acc * H**-0.5).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_acc.to(dv.dtype.element_ty), mask=inside)
