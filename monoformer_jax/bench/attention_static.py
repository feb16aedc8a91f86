"""Static cost estimate of the TPU kernels by head dim and row mix, see `planning.kernels`."""

from __future__ import annotations

import numpy as np

from monoformer_jax.attention.tpu_backward import FULL_PER_TURN
from monoformer_jax.attention.tpu_forward import Heads
from monoformer_jax.attention.tpu_kernel import Plan, plan_blocks
from monoformer_jax.bench.attention_rows import MIXES, sample_rows
from monoformer_jax.planning.kernels import PASSES, bundles, compile_and_dump

# `device_kind`, and multiply-adds that the matrix units of one core start per bundle.
CHIPS = {
    "v4": ("TPU v4", 65536),
    "v5e": ("TPU v5 lite", 65536),
    "v5p": ("TPU v5", 65536),
    "v6e": ("TPU v6 lite", 262144),
}
# Head dim: (key/value heads, query heads per key/value head). 64 is TinyLlama; 128 and 256 have the
# same width in larger heads.
GROUPED_HEADS = {64: (4, 8), 128: (4, 4), 256: (2, 4)}
ROWS_PER_MIX = 64


def heads_of(head_dim: int) -> Heads:
    """The kernel's head layout for `GROUPED_HEADS`."""
    return Heads(head_dim, GROUPED_HEADS[head_dim][1], 2 if head_dim == 64 else 1)


def static_rows(chips: list[str], head_dims: list[int]) -> list[dict]:
    """One result row per chip, head dim, mix and pass; "both" is the sum of the two passes."""
    rows = []
    for chip in chips:
        kind, per_bundle = CHIPS[chip]
        for head_dim in head_dims:
            heads = heads_of(head_dim)
            schedules = {}  # by block sizes, which determine the compiled program
            for mix_name, mix in MIXES.items():
                plan = plan_blocks(heads, mix.length, mix.length, 2, kind)
                blocks = (plan.queries, plan.keys, plan.wide)
                if blocks not in schedules:
                    schedules[blocks] = compile_and_dump(chip, heads, mix.length)
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
