"""Cycles of the attention kernels on TPU, from the compiler's schedule; needs no TPU.

libtpu compiles ahead of time for a chip that need not be present and dumps the VLIW bundles (one issues
per cycle) of every loop. The estimate is these bundles times the blocks that the mask makes each loop
visit. It ignores memory traffic and stalls: it is not a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from monoformer_jax.attention import IntervalMask
from monoformer_jax.attention.mask import key_block_bounds, query_block_bounds
from monoformer_jax.attention.tpu_backward import FULL_PER_TURN
from monoformer_jax.attention.tpu_forward import Heads
from monoformer_jax.attention.tpu_kernel import Plan, plan_blocks
from monoformer_jax.parallel import TENSOR_AXIS
from monoformer_jax.planning.hardware import CHIPS, chip_of

PASSES = ("forward", "backward")
# The smallest slice of a chip to compile for.
SMALLEST = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


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


@functools.cache
def compile_and_dump(
    chip: str, heads: Heads, length: int, dtype: str = "bfloat16"
) -> dict[str, Schedule]:
    """Compiles both passes for a chip in a subprocess; returns the schedule of each pass.

    Raises:
      RuntimeError: the compiler failed, or its dump is not as expected.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true",
            "JAX_PLATFORMS": "cpu",
        }
        shape = (heads.pair, heads.groups, heads.dim, length)
        command = [sys.executable, "-m", __name__, chip, dtype, *map(str, shape)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr[-2000:]}")
        return {name: schedule_of(pathlib.Path(directory), name) for name in PASSES}


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


def kernel_seconds(
    c, mesh: Mesh, topology: str, masks: tuple[IntervalMask, ...], rows: int
) -> dict[str, float]:
    """Seconds of one call of each attention kernel on a device, by the kernel's name.

    Args:
      c: config of a transformer, see `nn.config.DecoderConfig`.
      masks: of rows as they are trained on, [n, L]; one call each, of which the mean is taken.
      rows: rows of a call on a device.

    Raises:
      RuntimeError: see `compile_and_dump`.
    """
    name = chip_of(topology)
    chip, kind = CHIPS[name], mesh.devices.flat[0].device_kind
    kv_heads = c.num_kv_heads // mesh.shape[TENSOR_AXIS]
    heads = Heads(
        c.head_dim, c.num_heads // c.num_kv_heads, 2 if c.head_dim == 64 < 64 * kv_heads else 1
    )
    length = masks[0].start.shape[1]
    plan = plan_blocks(heads, length, length, jnp.dtype(c.dtype).itemsize, kind)
    schedules = compile_and_dump(name, heads, length, c.dtype)
    # Head blocks and rows are shared by the cores of a device.
    calls = rows * -(-kv_heads // heads.pair) / chip.cores
    return {
        f"interval_attention_{one}": sum(bundles(one, schedules[one], m, plan) for m in masks)
        / len(masks) * calls / (chip.clock_ghz * 1e9)
        for one in PASSES
    }  # fmt: skip


def compile_for(chip: str, dtype: str, kv_heads: int, groups: int, head_dim: int, length: int):
    """Compiles the forward and backward pass for a chip; runs in the subprocess."""
    import jax

    from monoformer_jax.attention import interval_attention
    from monoformer_jax.planning.hardware import abstract, one_chip

    mesh = one_chip(SMALLEST[chip])

    def loss(q, k, v, start, stop):
        q, k, v = (x.reshape(1, length, -1, head_dim) for x in (q, k, v))
        out = interval_attention(q, k, v, IntervalMask(start, stop), impl="tpu")
        return (out.astype(jnp.float32) ** 2).sum()

    query = abstract(mesh, (1, length, kv_heads * groups * head_dim), dtype)
    key = abstract(mesh, (1, length, kv_heads * head_dim), dtype)
    row = abstract(mesh, (1, length), jnp.int32)
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, row, row).compile()


if __name__ == "__main__":
    compile_for(*sys.argv[1:3], *map(int, sys.argv[3:]))
