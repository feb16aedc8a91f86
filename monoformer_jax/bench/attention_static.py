"""Static cost estimate of the TPU kernels from the compiler's schedule; needs no TPU.

libtpu compiles ahead of time for a chip that need not be present and dumps the VLIW bundles (one issues
per cycle) of every loop. The estimate is these bundles times the blocks that the mask makes each loop
visit. It ignores memory traffic, stalls and clock rate: it is not a measurement.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

from monoformer_jax.attention.mask import key_block_bounds, query_block_bounds
from monoformer_jax.attention.tpu_backward import FULL_PER_TURN
from monoformer_jax.attention.tpu_forward import Heads
from monoformer_jax.attention.tpu_kernel import Plan, plan_blocks
from monoformer_jax.bench.attention_rows import MIXES, sample_rows

# Topology, `device_kind`, and multiply-adds that the matrix units of one core start per bundle.
CHIPS = {
    "v4": ("v4:2x2x1", "TPU v4", 65536),
    "v5e": ("v5e:2x2", "TPU v5 lite", 65536),
    "v5p": ("v5p:2x2x1", "TPU v5", 65536),
    "v6e": ("v6e:2x2", "TPU v6 lite", 262144),
}
# Head dim: (key/value heads, query heads per key/value head). 64 is TinyLlama; 128 and 256 have the
# same width in larger heads.
GROUPED_HEADS = {64: (4, 8), 128: (4, 4), 256: (2, 4)}
PASSES = ("forward", "backward")
ROWS_PER_MIX = 64


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundle counts of one kernel.

    Args:
      once: per grid step, outside its loops over blocks.
      pair: per iteration of the loop that visits two masked blocks.
      edge: for the last masked block where their number is odd.
      full: per iteration of the loop over unmasked blocks: two wide visits in the forward pass,
        `FULL_PER_TURN` query blocks in the backward pass.
      other: per iteration of loops without matrix products (these clear and write dq).
    """

    once: int
    pair: int
    edge: int
    full: int
    other: int


def innermost_loops(text: str) -> tuple[int, list[tuple[int, int]]]:
    """Counts the bundles of a program and (bundles, matrix products) of each innermost loop.

    Args:
      text: a bundle listing in which LB marks the first bundle of a loop and the number of `>` is
        the loop depth.
    """
    open_loops: list[list] = []  # [depth, bundles, products, contains a loop]
    loops, total = [], 0
    for line in text.splitlines():
        found = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)(.*)", line)
        if not found:
            continue
        label, depth, body = found[1], len(found[2]), found[3]
        total += 1
        if depth or body.split("/*")[0].strip() != "{}":  # empty bundles carry no depth
            while open_loops and (
                open_loops[-1][0] > depth or (label == "LB" and open_loops[-1][0] == depth)
            ):
                loops.append(open_loops.pop())
        if label == "LB":
            if open_loops:
                open_loops[-1][3] = True
            open_loops.append([depth, 0, 0, False])
        if open_loops:
            open_loops[-1][1] += 1
            open_loops[-1][2] += body.count("vmatmul")
    loops += reversed(open_loops)
    return total, [(bundles, products) for _, bundles, products, outer in loops if not outer]


def schedule_of(directory: pathlib.Path, name: str) -> Schedule:
    """Reads the schedule of a pass from the compiler's dump.

    Raises:
      RuntimeError: the dump does not contain the three loops of the kernel's source.
    """
    files = sorted(directory.glob(f"*interval_attention_{name}*-packed-bundles-post-ra.txt"))
    if not files:
        raise RuntimeError(f"libtpu dumped no schedule for the {name} kernel")
    total, loops = innermost_loops(files[-1].read_text(encoding="utf-8", errors="replace"))
    visits = [loop for loop in loops if loop[1]]
    if len(visits) != 3 or visits[0][1] != 2 * visits[1][1]:
        raise RuntimeError(
            f"{name}: loops with (bundles, products) {visits} are not the expected three: a pair of "
            "masked blocks, one masked block, unmasked blocks"
        )
    other = sum(bundles for bundles, count in loops if not count)
    once = total - sum(bundles for bundles, _ in loops)
    return Schedule(once, *(bundles for bundles, _ in visits), other)


def compile_and_dump(chip: str, head_dim: int, length: int) -> dict[str, Schedule]:
    """Compiles both passes for a chip in a subprocess; returns the schedule of each pass."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", __name__, chip, str(head_dim), str(length)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr[-2000:]}")
        return {name: schedule_of(pathlib.Path(directory), name) for name in PASSES}


def heads_of(head_dim: int) -> Heads:
    """The kernel's head layout for `GROUPED_HEADS`."""
    return Heads(head_dim, GROUPED_HEADS[head_dim][1], 2 if head_dim == 64 else 1)


def bundles(name: str, schedule: Schedule, mask, plan: Plan) -> float:
    """Mean bundles per row of one pass over the rows of a mask, for one block of heads."""
    rows, length = mask.start.shape
    bounds = key_block_bounds(mask, plan.queries, plan.keys)
    if name == "backward":
        bounds = query_block_bounds(bounds, length // plan.keys)
    lo, full_lo, full_hi, hi = (np.asarray(x) for x in bounds)
    full = full_hi - full_lo
    per_turn = 2 * plan.wide // plan.keys if name == "forward" else FULL_PER_TURN
    turns = full // per_turn
    edges = (hi - lo) - per_turn * turns
    steps = schedule.once * lo.size + schedule.other * rows * (length // plan.queries)
    loops = schedule.full * turns + schedule.pair * (edges // 2) + schedule.edge * (edges % 2)
    return float(steps + loops.sum()) / rows


def static_rows(chips: list[str], head_dims: list[int]) -> list[dict]:
    """One result row per chip, head dim, mix and pass; "both" is the sum of the two passes."""
    rows = []
    for chip in chips:
        _, kind, per_bundle = CHIPS[chip]
        for head_dim in head_dims:
            heads = heads_of(head_dim)
            schedules = {}  # by block sizes, which determine the compiled program
            for mix_name, mix in MIXES.items():
                plan = plan_blocks(heads, mix.length, mix.length, 2, kind)
                blocks = (plan.queries, plan.keys, plan.wide)
                if blocks not in schedules:
                    schedules[blocks] = compile_and_dump(chip, head_dim, mix.length)
                mask = sample_rows(mix, ROWS_PER_MIX)
                whole = type(mask)(np.zeros_like(mask.start), np.full_like(mask.stop, mix.length))
                counts = {}
                for name in PASSES:
                    schedule = schedules[blocks][name]
                    costs = [bundles(name, schedule, x, plan) for x in (mask, whole)]
                    counts[name] = np.array([schedule.full, work(name, heads, plan), *costs])
                counts["both"] = counts["forward"] + counts["backward"]
                for name, (full, products, cost, dense) in counts.items():
                    rows.append({
                        "chip": chip, "head_dim": head_dim, "pass": name, "mix": mix_name,
                        "loop_bundles": int(full), "mxu_share": products / full / per_bundle,
                        "cost_vs_dense": cost / dense,
                    })  # fmt: skip
    return rows


def work(name: str, heads: Heads, plan: Plan) -> int:
    """Useful multiply-adds per iteration of a pass's loop over unmasked blocks."""
    if name == "forward":
        pairs = 2 * plan.queries * 2 * plan.wide
    else:
        pairs = 5 * plan.queries * FULL_PER_TURN * plan.keys
    # With a pair of 64-wide key/value heads, half of each product is with zeros: see `Heads.stack`.
    return pairs * heads.count * heads.dim


def compile_for(chip: str, head_dim: int, length: int) -> None:
    """Compiles the forward and backward pass for a chip; runs in the subprocess."""
    import jax
    import jax.numpy as jnp

    from monoformer_jax.attention import IntervalMask, interval_attention
    from monoformer_jax.planning.hardware import abstract, one_chip

    mesh = one_chip(CHIPS[chip][0])
    kv_heads, groups = GROUPED_HEADS[head_dim]

    def loss(q, k, v, start, stop):
        q, k, v = (x.reshape(1, length, -1, head_dim) for x in (q, k, v))
        out = interval_attention(q, k, v, IntervalMask(start, stop), impl="tpu")
        return (out.astype(jnp.float32) ** 2).sum()

    query = abstract(mesh, (1, length, kv_heads * groups * head_dim), jnp.bfloat16)
    key = abstract(mesh, (1, length, kv_heads * head_dim), jnp.bfloat16)
    row = abstract(mesh, (1, length), jnp.int32)
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, row, row).compile()


if __name__ == "__main__":
    compile_for(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
