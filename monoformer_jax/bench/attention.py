"""Times interval attention on this machine against the other attention libraries installed.

    python -m monoformer_jax.bench attention            every mix, forward and backward
    python -m monoformer_jax.bench attention --static   compiler counts for TPU, no TPU needed

Outputs are checked before timing: an implementation that differs by more than 2e-2 from the float32
reference (relative to its largest value) is reported as wrong and not timed. Useful TFLOP/s count only
visible (query, key) pairs, so block skipping raises them and work on padding does not.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask, dense_attention, mask_area
from monoformer_jax.bench import attention_flex
from monoformer_jax.bench.attention_peers import PEERS, Missing, platform
from monoformer_jax.bench.attention_rows import MIXES, sample_rows
from monoformer_jax.bench.matmul import matmul_tflops, milliseconds, native_dtype
from monoformer_jax.errors import require

FLOPS = {"forward": 4, "backward": 10, "both": 14}  # per visible pair, query head, head dim element
LARGEST_ERROR = 2e-2
TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}  # per call
HEADS = {"cpu": "4x1x64", "gpu": "16x4x128", "tpu": "16x4x128"}
CPU_MIXES = ["text to image 256, 512 unpacked", "text to image 256, packed 2048"]


def make_inputs(heads: str, mask: IntervalMask, dtype) -> list[jax.Array]:
    """Returns q, k, v and the gradient of the output, for heads given as "NxKxH"."""
    query_heads, kv_heads, head_dim = map(int, heads.split("x"))
    batch, length = mask.start.shape
    shapes = [(batch, length, n, head_dim) for n in (query_heads, kv_heads, kv_heads, query_heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes)]


def relative_error(out: np.ndarray, inputs: list[jax.Array], mask: IntervalMask) -> float:
    """Largest error in the first row, relative to the largest value of the float32 reference."""
    row = jax.tree.map(lambda x: jnp.asarray(x[:1]), mask)
    q, k, v = (x[:1].astype(jnp.float32) for x in inputs[:3])
    with jax.default_matmul_precision("highest"):
        want = np.asarray(jax.jit(dense_attention)(q, k, v, row)[0])
    return float(np.abs(np.asarray(out[:1], np.float32) - want).max() / np.abs(want).max())


def time_passes(run, inputs: list[jax.Array], repeats: int) -> dict[str, float]:
    """Milliseconds per forward pass, backward pass alone, and both passes in one program."""
    *qkv, dout = inputs
    forward = jax.jit(run)
    # The function that jax.vjp returns is a pytree of residuals, so one jitted program can return
    # it and another can take it as an argument.
    residuals = jax.jit(lambda *x: jax.vjp(run, *x)[1])(*qkv)
    backward = jax.jit(lambda pull, gradient: pull(gradient))
    both = jax.jit(lambda gradient, *x: jax.vjp(run, *x)[1](gradient))
    return {
        "forward": milliseconds(lambda: forward(*qkv), repeats),
        "backward": milliseconds(lambda: backward(residuals, dout), repeats),
        "both": milliseconds(lambda: both(dout, *qkv), repeats),
    }


def bench_mix(name: str, options: argparse.Namespace) -> list[dict]:
    """Result rows of every implementation that runs here, for one mix; prints why others do not."""
    mix = MIXES[name]
    count = max(options.tokens // mix.length, 1)
    # All rows are equal, because some libraries need the mask to be static at trace time.
    mask = jax.tree.map(lambda x: np.repeat(x, count, 0), sample_rows(mix, 1))
    inputs = make_inputs(options.heads, mask, native_dtype())
    query_heads, _, head_dim = map(int, options.heads.split("x"))
    useful = int(np.asarray(mask_area(mask)).sum()) * query_heads * head_dim
    rows = []
    for impl in [*PEERS, "torch flex"]:
        try:
            if impl == "torch flex":
                host = [np.asarray(x, np.float32) for x in inputs]
                out, found = attention_flex.times(*host, mask, options.repeats)
                error = relative_error(out, inputs, mask)
            else:
                run = PEERS[impl](mask)
                error = relative_error(jax.jit(run)(*inputs[:3]), inputs, mask)
                found = {}
                if error <= LARGEST_ERROR:
                    found = time_passes(run, inputs, options.repeats)
        except Missing as reason:
            print(f"  {impl:14}not run: {reason}")
            continue
        except Exception as failure:
            print(f"  {impl:14}failed: {type(failure).__name__}: {str(failure)[:160]}")
            continue
        if error > LARGEST_ERROR:
            print(f"  {impl:14}wrong: relative error {error:.1e}; not timed")
            continue
        for pass_, ms in found.items():
            tflops = FLOPS[pass_] * useful / ms / 1e9
            rows.append(
                {"impl": impl, "mix": name, "pass": pass_, "ms": ms, "useful_tflops": tflops,
                 "max_error": error}
            )  # fmt: skip
    return rows


def print_rows(rows: list[dict], ceiling: float) -> None:
    """Prints a line per implementation and pass; the ratio is its time divided by the time of ours."""
    subject = "dense" if platform() == "cpu" else "ours"
    mine = {row["pass"]: row["ms"] for row in rows if row["impl"] == subject}
    for row in rows:
        ratio = row["ms"] / mine[row["pass"]] if row["pass"] in mine else float("nan")
        print(
            f"  {row['impl']:14}{row['pass']:10}{row['ms']:10.3f} ms"
            f"{row['useful_tflops']:9.3f} useful TFLOP/s{ratio:7.2f}x the time of {subject}"
            f"{row['useful_tflops'] / ceiling:8.1%} of a matmul   error {row['max_error']:.0e}"
        )


def live(options: argparse.Namespace) -> dict:
    """Times every implementation on this machine and prints the results."""
    device = jax.devices()[0]
    ceiling = matmul_tflops(native_dtype(), options.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}: matmul {ceiling:.3f} TFLOP/s")
    rows = []
    for name in options.mixes:
        print(f"{name}, heads {options.heads} (N x K x H)")
        found = bench_mix(name, options)
        print_rows(found, ceiling)
        rows += found
    return {"device": device.device_kind, "matmul_tflops": ceiling, "rows": rows}


def static(options: argparse.Namespace) -> dict:
    """Prints the bundle counts of the TPU compiler."""
    from monoformer_jax.bench import attention_static

    print("static estimate from the bundles that libtpu schedules; nothing was run or timed")
    print(f"{'chip':6}{'H':>4}  {'pass':10}{'mix':36}{'bundles':>8}{'of MXU':>8}{'of dense':>10}")
    rows = attention_static.static_rows(options.chips, options.head_dims)
    for row in rows:
        print(
            f"{row['chip']:6}{row['head_dim']:4}  {row['pass']:10}{row['mix']:36}"
            f"{row['loop_bundles']:8}{row['mxu_share']:8.1%}{row['cost_vs_dense']:10.1%}"
        )
    return {"rows": rows}


def run(options: argparse.Namespace) -> dict:
    """Runs the benchmark; some defaults depend on the platform.

    Raises:
      InputError: an unknown chip or mix, or heads in another form.
    """
    if options.static:
        from monoformer_jax.bench.attention_static import CHIPS

        _known("--chips", options.chips, CHIPS)
        return static(options)
    _known("--mixes", options.mixes or (), MIXES)
    options.mixes = options.mixes or (CPU_MIXES if platform() == "cpu" else list(MIXES))
    options.heads = options.heads or HEADS[platform()]
    options.tokens = options.tokens or TOKENS[platform()]
    require(
        re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}", options.heads) is not None,
        f"--heads={options.heads} is not query heads x KV heads x head dim, such as 32x4x64",
    )
    return live(options)


def _known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    require(not unknown, f"{option}: unknown {', '.join(unknown)}, choose from {', '.join(known)}")
