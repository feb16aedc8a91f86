"""The attention benchmark: row mixes, parsing of compiler schedules, and JSON output."""

import json
import subprocess
import sys

import numpy as np
import pytest

from monoformer_jax.attention import IntervalMask, check_mask, mask_area
from monoformer_jax.attention.tpu_kernel import Plan
from monoformer_jax.bench.__main__ import main
from monoformer_jax.bench.attention_rows import MIXES, sample_rows
from monoformer_jax.bench.attention_static import static_rows
from monoformer_jax.planning.kernels import Schedule, bundles, innermost_loops, schedule_of

# Two loops nested in one, the second with a matrix product in every bundle, an empty bundle between.
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


def test_innermost_loops_of_a_listing():
    total, loops = innermost_loops(LISTING)
    assert total == 9
    assert loops == [(3, 0), (2, 3)]


@pytest.mark.parametrize("name", MIXES)
def test_masks_are_valid_and_monotone(name):
    mask = sample_rows(MIXES[name], 8)
    check_mask(mask, MIXES[name].length)
    assert (np.diff(mask.start) >= 0).all() and (np.diff(mask.stop) >= 0).all()
    assert (mask_area(mask) > 0).all()


def test_help_and_bad_arguments(capsys):
    assert main(["--help"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["atention"]) == 2
    assert "unknown bench 'atention': choose from attention" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["attention", "--help"])
    assert stop.value.code == 0
    assert main(["attention", "--static", "--chips", "v9"]) == 2
    assert "--chips: unknown v9, choose from" in capsys.readouterr().err


@pytest.mark.slow
def test_live_bench_writes_json(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "monoformer_jax.bench", "attention", "--json", str(file)]
    options = ["--mixes", "text to image 256, 512 unpacked", "--heads", "1x1x64", "--tokens", "512"]
    done = subprocess.run(
        [*command, *options, "--repeats", "1"], capture_output=True, text=True, check=True
    )
    assert "ours          not run: there is no CPU kernel" in done.stdout
    rows = json.loads(file.read_text())["rows"]
    assert {(row["impl"], row["pass"]) for row in rows} == {
        (impl, name) for impl in ("dense", "jax.nn xla") for name in ("forward", "backward", "both")
    }
    for row in rows:
        assert set(row) == {"impl", "mix", "pass", "ms", "useful_tflops", "max_error"}
        assert row["ms"] > 0 and row["useful_tflops"] > 0 and row["max_error"] < 1e-4


@pytest.mark.slow
def test_static_estimates_stay_within_bounds():
    """MXU share and the gain of packing, with a margin for other compiler versions."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    rows = {(r["chip"], r["pass"], r["mix"]): r for r in static_rows(["v5e"], [128])}
    mix = "text to image 256, packed 2048"
    assert rows["v5e", "forward", mix]["mxu_share"] >= 0.85
    assert rows["v5e", "backward", mix]["mxu_share"] >= 0.93
    for name in ("forward", "backward"):
        assert rows["v5e", name, mix]["cost_vs_dense"] <= 0.5
        whole = rows["v5e", name, "text, one document of 4096"]["cost_vs_dense"]
        assert 0.5 < whole < 0.7  # causal: half, plus the blocks on the diagonal


def test_bundles_of_a_full_mask_count_unmasked_blocks():
    mask = sample_rows(MIXES["text to image 256, packed 2048"], 1)
    whole = type(mask)(np.zeros_like(mask.start), np.full_like(mask.stop, 2048))
    schedule = Schedule(once=1, pair=1000, edge=1000, full=10, other=0)
    plan = Plan(256, 256, 512, 2048, 2048, 0)
    # 8 query blocks, each with `once` and 2 iterations over 4 blocks of 256 keys.
    assert bundles("forward", schedule, whole, plan) == 8 * (1 + 2 * 10)
    # 8 key blocks, each with `once` and 4 iterations over 2 query blocks.
    assert bundles("backward", schedule, whole, plan) == 8 * (1 + 4 * 10)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_bundles_of_masked_blocks_are_counted_in_pairs(name):
    at = np.arange(512, dtype=np.int32)[None]
    causal = IntervalMask(np.zeros_like(at), at + 1)
    schedule = Schedule(once=1, pair=100, edge=1000, full=10, other=3)
    plan = Plan(128, 128, 128, 512, 512, 0)  # both passes visit two unmasked blocks per iteration
    # The four blocks of a side visit 0, 1, 2 and 3 unmasked blocks and one on the diagonal: 0, 0, 1
    # and 1 unmasked iterations, after which 1, 2, 1 and 2 blocks remain for the masked loops.
    counted = 4 * (1 + 3) + 2 * 10 + 2 * 100 + 2 * 1000
    assert bundles(name, schedule, causal, plan) == counted


def listing_of_loops(products):
    """A listing with one loop of n bundles, each with a matrix product, for each n."""
    lines = ["0 : { %s1 = smov.u32 0 }"]
    for n in products:
        lines += [f"0x1 {'LB' if i == 0 else ''}: > {{ vmatmul.bf16 }}" for i in range(n)]
        lines.append("0x1 : { %s1 = smov.u32 0 }")
    return "\n".join(lines)


def test_unexpected_loops_are_rejected(tmp_path):
    file = tmp_path / "1-interval_attention_forward.1-65-packed-bundles-post-ra.txt"
    file.write_text(listing_of_loops([4, 2, 8]))
    assert schedule_of(tmp_path, "forward") == Schedule(once=4, pair=4, edge=2, full=8, other=0)
    for products in ([2, 8, 2], [4, 2], [4, 2, 8, 2]):
        file.write_text(listing_of_loops(products))
        with pytest.raises(RuntimeError, match="are not the expected three: a pair"):
            schedule_of(tmp_path, "forward")
