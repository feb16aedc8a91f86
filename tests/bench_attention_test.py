"""The attention bench: its row mixes, its reading of a schedule, and what it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from monoformer_jax.attention import IntervalMask, check_mask, mask_area
from monoformer_jax.attention.tpu_kernel import Plan
from monoformer_jax.bench.__main__ import main
from monoformer_jax.bench.attention_rows import MIXES, sample_rows
from monoformer_jax.bench.attention_static import (
    Schedule,
    bundles,
    innermost_loops,
    schedule_of,
    static_rows,
)

# Two loops inside one, the second with a product in every bundle, and an empty bundle in between.
LISTING = """
= control target key start
   0   :  { %s1 = smov.u32 0 }
 0x1 LB: > { %s2 = sadd.s32 1 }
 0x2 LB: >> { %v1 = vld [vmem:[#allocation2] sm:$0xff] }
 0x3   : >> { %v2 = vadd.f32 %v1, %v1 }
 0x4   :  {}
 0x5   : > { %s3 = sadd.s32 1 }
 0x6 LB: >> { %v3 = vmatmul.mubr.bf16.gmra.mxu0 %v2 ;;  %v4 = vmatmul.mubr.bf16.gmra.mxu1 %v2 }
 0x7   : >> { %v5 = vmatmul.mubr.bf16.gmra.mxu0 %v2 } /* end */
 0x8   :  { %s4 = sadd.s32 1 }
"""


def test_loops_of_a_schedule():
    total, loops = innermost_loops(LISTING)
    assert total == 9
    assert loops == [(3, 0), (2, 3)]


@pytest.mark.parametrize("name", MIXES)
def test_rows_are_sound_and_monotone(name):
    mask = sample_rows(MIXES[name], 8)
    check_mask(mask, MIXES[name].length)
    assert (np.diff(mask.start) >= 0).all() and (np.diff(mask.stop) >= 0).all()
    assert (mask_area(mask) > 0).all()


def test_help_and_mistakes(capsys):
    assert main(["--help"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["atention"]) == 2
    assert "'atention' is none of attention" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["attention", "--help"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["attention", "--static", "--chips", "v9"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_live_rows_on_this_machine(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "monoformer_jax.bench", "attention", "--json", str(file)]
    options = ["--mixes", "text to image 256, 512 unpacked", "--heads", "1x1x64", "--tokens", "512"]
    done = subprocess.run(
        [*command, *options, "--repeats", "1"], capture_output=True, text=True, check=True
    )
    assert "ours          not run: there is no kernel for a CPU" in done.stdout
    rows = json.loads(file.read_text())["rows"]
    assert {(row["impl"], row["pass"]) for row in rows} == {
        (impl, name) for impl in ("dense", "jax.nn xla") for name in ("forward", "backward", "both")
    }
    for row in rows:
        assert set(row) == {"impl", "mix", "pass", "ms", "useful_tflops", "max_error"}
        assert row["ms"] > 0 and row["useful_tflops"] > 0 and row["max_error"] < 1e-4


@pytest.mark.slow
def test_static_estimates_stay_where_they_are():
    """Shares of the matrix units and the gain of packing; a compiler may move them a little."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    rows = {(r["chip"], r["pass"], r["mix"]): r for r in static_rows(["v5e"], [128])}
    mix = "text to image 256, packed 2048"
    assert rows["v5e", "forward", mix]["mxu_share"] >= 0.85
    assert rows["v5e", "backward", mix]["mxu_share"] >= 0.93
    for name in ("forward", "backward"):
        assert rows["v5e", name, mix]["cost_vs_dense"] <= 0.5
        whole = rows["v5e", name, "text, one document of 4096"]["cost_vs_dense"]
        assert 0.5 < whole < 0.7  # a causal row: half, and the blocks on the diagonal


def test_bundles_of_a_row_that_sees_everything_are_those_of_full_blocks():
    mask = sample_rows(MIXES["text to image 256, packed 2048"], 1)
    whole = type(mask)(np.zeros_like(mask.start), np.full_like(mask.stop, 2048))
    schedule = Schedule(once=1, pair=1000, edge=1000, full=10, other=0)
    plan = Plan(256, 256, 512, 2048, 2048, 0)
    # 8 blocks of queries: each 1 once and 2 turns of 4 blocks of 256 keys.
    assert bundles("forward", schedule, whole, plan) == 8 * (1 + 2 * 10)
    # 8 blocks of keys: each 1 once and 4 turns of 2 blocks of queries.
    assert bundles("backward", schedule, whole, plan) == 8 * (1 + 4 * 10)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_bundles_of_blocks_with_the_mask_are_counted_in_pairs(name):
    at = np.arange(512, dtype=np.int32)[None]
    causal = IntervalMask(np.zeros_like(at), at + 1)
    schedule = Schedule(once=1, pair=100, edge=1000, full=10, other=3)
    plan = Plan(128, 128, 128, 512, 512, 0)  # two blocks in a turn without the mask, in both passes
    # The four blocks of a side see 0, 1, 2 and 3 whole blocks and one on the diagonal, so 0, 0, 1
    # and 1 turns without the mask are left with 1, 2, 1 and 2 blocks.
    counted = 4 * (1 + 3) + 2 * 10 + 2 * 100 + 2 * 1000
    assert bundles(name, schedule, causal, plan) == counted


def listing_of_loops(products):
    """A program of one loop with `n` products, one a bundle, for each n."""
    lines = ["0 : { %s1 = smov.u32 0 }"]
    for n in products:
        lines += [f"0x1 {'LB' if i == 0 else ''}: > {{ vmatmul.bf16 }}" for i in range(n)]
        lines.append("0x1 : { %s1 = smov.u32 0 }")
    return "\n".join(lines)


def test_loops_of_another_kernel_are_not_counted(tmp_path):
    file = tmp_path / "1-interval_attention_forward.1-65-packed-bundles-post-ra.txt"
    file.write_text(listing_of_loops([4, 2, 8]))
    assert schedule_of(tmp_path, "forward") == Schedule(once=4, pair=4, edge=2, full=8, other=0)
    for products in ([2, 8, 2], [4, 2], [4, 2, 8, 2]):
        file.write_text(listing_of_loops(products))
        with pytest.raises(RuntimeError, match="not a pair of blocks, one, and full"):
            schedule_of(tmp_path, "forward")
