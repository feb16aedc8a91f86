"""Static estimate of the TPU kernels: the compiler's own schedule, counted without a TPU.

libtpu compiles for a chip that is not there and writes down the bundles (one is issued in a cycle)
of every loop. Bundles times the blocks that the mask makes a loop visit is an estimate that knows
nothing of memory, of waiting or of the clock: never a measurement.
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

# Topology, `device_kind`, and multiply-adds that the matrix units of one core start in a bundle.
CHIPS = {
    "v4": ("v4:2x2x1", "TPU v4", 65536),
    "v5e": ("v5e:2x2", "TPU v5 lite", 65536),
    "v5p": ("v5p:2x2x1", "TPU v5", 65536),
    "v6e": ("v6e:2x2", "TPU v6 lite", 262144),
}
# As TinyLlama has them (64), or with the same width in larger heads.
GROUPED_HEADS = {64: (4, 8), 128: (4, 4), 256: (2, 4)}
PASSES = ("forward", "backward")
ROWS_PER_MIX = 64


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of one kernel.

    Args:
      once: of a grid step outside its loops over blocks.
      pair: of a turn of the loop that visits two blocks with the mask applied.
      edge: of the visit of the last such block where their number is odd.
      full: of one turn of the loop without the mask: two wide visits in the forward pass,
        `FULL_PER_TURN` blocks of queries in the backward pass.
      other: of one turn of loops without products (dq is cleared and written in such loops).
    """

    once: int
    pair: int
    edge: int
    full: int
    other: int


def innermost_loops(text: str) -> tuple[int, list[tuple[int, int]]]:
    """Bundles of a program, and (bundles, matrix products) of each loop that holds no other loop.

    Args:
      text: a listing in which a loop's first bundle is marked LB and `>` counts the loops around
        a bundle.
    """
    open_loops: list[list] = []  # [depth, bundles, products, holds a loop]
    loops, total = [], 0
    for line in text.splitlines():
        found = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)(.*)", line)
        if not found:
            continue
        label, depth, body = found[1], len(found[2]), found[3]
        total += 1
        if depth or body.split("/*")[0].strip() != "{}":  # an empty bundle does not show its depth
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
      RuntimeError: the dump does not hold the three loops that the kernel is written with.
    """
    files = sorted(directory.glob(f"*interval_attention_{name}*-packed-bundles-post-ra.txt"))
    if not files:
        raise RuntimeError(f"libtpu wrote no schedule of the {name} kernel")
    total, loops = innermost_loops(files[-1].read_text(errors="replace"))
    visits = [loop for loop in loops if loop[1]]
    if len(visits) != 3 or visits[0][1] != 2 * visits[1][1]:
        raise RuntimeError(
            f"{name}: loops of {visits} (bundles, products) are not a pair of blocks, one, and full"
        )
    other = sum(bundles for bundles, count in loops if not count)
    once = total - sum(bundles for bundles, _ in loops)
    return Schedule(once, *(bundles for bundles, _ in visits), other)


def compile_and_dump(chip: str, head_dim: int, length: int) -> dict[str, Schedule]:
    """Compiles both passes for a chip in a process of its own; schedules by pass."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", __name__, chip, str(head_dim), str(length)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr[-2000:]}")
        return {name: schedule_of(pathlib.Path(directory), name) for name in PASSES}


def heads_of(head_dim: int) -> Heads:
    """The layout that the kernel takes for the benched heads."""
    return Heads(head_dim, GROUPED_HEADS[head_dim][1], 2 if head_dim == 64 else 1)


def bundles(name: str, schedule: Schedule, mask, plan: Plan) -> float:
    """Bundles of one pass over the rows of a mask, for one block of heads, a row on average."""
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
    """One row for each chip, head dim, mix and pass; in "both" the two passes are added up."""
    rows = []
    for chip in chips:
        _, kind, per_bundle = CHIPS[chip]
        for head_dim in head_dims:
            heads = heads_of(head_dim)
            schedules = {}  # rows with the same blocks run the same program
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
    """Useful multiply-adds in one turn of a pass's loop without the mask."""
    if name == "forward":
        pairs = 2 * plan.queries * 2 * plan.wide
    else:
        pairs = 5 * plan.queries * FULL_PER_TURN * plan.keys
    # Of a pair of 64-wide heads only one is met: the other half of the products are with zeros.
    return pairs * heads.count * heads.dim


def compile_for(chip: str, head_dim: int, length: int) -> None:
    """Compiles forward and backward for a chip; what the child process does."""
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
