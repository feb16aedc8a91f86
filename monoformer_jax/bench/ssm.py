"""Times both forms of the bidirectional state-space convolution beside attention over as many tokens.

    python -m monoformer_jax.bench ssm                      forward and backward on this machine
    python -m monoformer_jax.bench ssm --chip=v5e:2x2       compiled for one chip, without a TPU

Rows: the form, the length L, the width, and for --batch sequences the milliseconds of value and
gradients, and the largest error of the output against the recurrence in float64, by the largest output.
Attention has heads of 64 that see all tokens, and no projections; its kernel for TPU is not compiled.
With --chip: FLOPs, bytes and temporaries as its compiler counts them, and the bound of the time that
follows from the chip's peaks.
"""

from __future__ import annotations

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from monoformer_jax.attention import IntervalMask, interval_attention
from monoformer_jax.errors import require
from monoformer_jax.nn import ssm
from monoformer_jax.planning.hardware import CHIPS, abstract, chip_of, one_chip

FORMS = ("fft", "chunked")


def make_step(dim: int, state_size: int, form: str, chunk: int):
    """Returns (params, u) -> the loss and its gradients, and the parameters."""
    module = ssm.BidirectionalSSM(dim, state_size, nnx.Rngs(0))
    graph, params = nnx.graphdef(module), nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def loss(params, u):
        y = nnx.merge(graph, params)(u, form, chunk)
        return jnp.square(y.astype(jnp.float32)).mean(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)), params


def attention_step(u):
    """Value and gradients of attention with u [B, L, D] as queries, keys and values."""
    rows = jnp.zeros(u.shape[:2], jnp.int32)
    mask = IntervalMask(rows, rows + u.shape[1])

    def loss(q, k, v):
        out = interval_attention(q, k, v, mask)
        return jnp.square(out.astype(jnp.float32)).mean()

    heads = rearrange(u, "B L (N H) -> B L N H", H=math.gcd(u.shape[2], 64))
    return jax.value_and_grad(loss, (0, 1, 2))(heads, heads, heads)


def recurrence(params: dict, u: np.ndarray) -> np.ndarray:
    """One direction of one sequence in float64, [L, D] -> [L, D]."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    dim = u.shape[1]
    a = (-np.exp(p["log_decay"]) + 1j * p["frequency"]).reshape(dim, -1)
    decay = np.exp(np.exp(p["log_step"])[:, None] * a)
    gain, c = (decay - 1) / a, p["output"][..., 0] + 1j * p["output"][..., 1]
    state, found = np.zeros_like(a), np.empty(u.shape)
    for l, x in enumerate(u):
        state = decay * state + gain * x[:, None]
        found[l] = 2 * (c * state).real.sum(-1) + p["skip"] * x
    return found


def max_error(y: jax.Array, params: dict, u: jax.Array) -> float:
    """Largest error of the first sequence, by its largest output."""
    u, y = np.asarray(u[0], np.float64), np.asarray(y[0], np.float64)
    backward = recurrence(params["backward"], u[::-1])[::-1]
    want = np.stack([recurrence(params["forward"], u), backward], 1)
    return float(np.abs(y - want).max() / np.abs(want).max())


def measure(lengths: list[int], options: argparse.Namespace) -> list[dict]:
    """Times the forms in turn; the fastest of `repeats` rounds counts."""
    rows = []
    for length in lengths:
        u = jax.random.normal(jax.random.key(0), (options.batch, length, options.dim))
        u, runs = u.astype(options.dtype), {}
        for form in FORMS:
            step, params = make_step(options.dim, options.state_size, form, options.chunk)
            (_, y), _ = jax.block_until_ready(step(params, u))
            error = max_error(y, params, u.astype(jnp.float32))
            runs[form] = functools.partial(step, params), {"max_error": error}, []
        runs["attention"] = jax.jit(attention_step), {}, []
        jax.block_until_ready(runs["attention"][0](u))
        for _ in range(options.repeats):
            for step, _, times in runs.values():
                begin = time.perf_counter()
                jax.block_until_ready(step(u))
                times.append(time.perf_counter() - begin)
        for form, (_, error, times) in runs.items():
            rows.append({"form": form, "length": length, "dim": options.dim,
                         "ms": 1e3 * min(times), **error})  # fmt: skip
    return rows


def compile_for(topology: str, lengths: list[int], options: argparse.Namespace) -> list[dict]:
    """Compiles the forms for one chip; a bound of the time from FLOPs and bytes at the chip's peaks."""
    mesh, chip, rows = one_chip(topology), CHIPS[chip_of(topology)], []
    for length in lengths:
        for form in FORMS:
            step, params = make_step(options.dim, options.state_size, form, options.chunk)
            arguments = jax.tree.map(lambda x: abstract(mesh, x.shape, x.dtype), params)
            u = abstract(mesh, (options.batch, length, options.dim), options.dtype)
            with jax.set_mesh(mesh):
                compiled = step.lower(arguments, u).compile()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            flops, moved = cost["flops"], cost["bytes accessed"]
            bound = max(flops / (chip.tflops * 1e12), moved / (chip.hbm_gbs * 1e9))
            rows.append({
                "form": form, "length": length, "dim": options.dim, "gflops": flops / 1e9,
                "gbytes": moved / 1e9, "temporaries_gib": memory.temp_size_in_bytes / 2**30,
                "bound_ms": 1e3 * bound,
            })  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Runs the benchmark and prints its rows.

    Raises:
      InputError: lengths that are not numbers, or see `chip_of`.
    """
    lengths = options.lengths.split(",")
    require(
        all(length.isdecimal() and 0 < int(length) < 10**7 for length in lengths),
        f"--lengths={options.lengths} is not a list of numbers, such as 64,256",
    )
    lengths = [int(length) for length in lengths]
    rows = (
        compile_for(options.chip, lengths, options) if options.chip else measure(lengths, options)
    )
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))  # fmt: skip
    return {"rows": rows}
