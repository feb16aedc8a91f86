"""Ahead-of-time compilation of the TPU kernels for every chip generation; no TPU is needed.

The compiled programs must not copy any array of the size of q, k or v into another layout around the
kernels, and temporaries must grow with L, not with L².
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
pytest.importorskip("libtpu", reason="libtpu is for Linux only")

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "Ironwood": "tpu7x:2x2x1",
}
# B, L, K, G, H, dtype, pass.
FAST = ["1,512,2,4,128,bfloat16,both", "1,512,2,4,128,bfloat16,union"]
CASES = [
    "2,512,4,8,64,bfloat16,forward",
    "1,32768,1,4,128,bfloat16,both",
    "1,32768,2,8,64,bfloat16,both",
]
# On the chip with the least VMEM, where all limits are tightest.
MORE = [
    "2,4096,2,1,256,bfloat16,both",
    "1,4096,1,4,128,float32,both",
    "1,32768,1,4,128,bfloat16,forward",
]


def compiled(topology: str, cases: list[str]) -> list[dict]:
    """Runs `tpu_compile` in a separate process and returns its results."""
    done = subprocess.run(
        [sys.executable, str(HERE / "tpu_compile.py"), topology, *cases],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(topology: str, found: list[dict]) -> None:
    """Asserts that the kernels exist, that there are no copies, and O(L) temporaries."""
    for program in found:
        batch, length, kv_heads, groups, head_dim = map(int, program["case"].split(",")[:5])
        itemsize = 4 if "float32" in program["case"] else 2
        direction = program["case"].split(",")[-1]
        assert program["kernels"] == (1 if direction == "forward" else 3), program
        assert program["calls"] == {"forward": 1, "both": 2, "union": 4}[direction], program
        assert not program["copies"]["relayout"], program
        # Ironwood's compiler tiles the rows of a kernel's results by 16 but of its operands by 8.
        assert len(program["copies"]["retile"]) <= ("tpu7x" in topology), program
        # A generous bound for q, out, dq, dout and float32 dk, dv, each of which is O(L).
        operands = batch * length * (kv_heads * groups + 2 * kv_heads) * head_dim * itemsize
        assert program["temp_bytes"] <= 6 * operands + 2**20, program


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v6e", marks=pytest.mark.slow)])
def test_layer_compiles(chip):
    """The smallest program, for one chip generation."""
    check(TOPOLOGIES[chip], compiled(TOPOLOGIES[chip], FAST))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_kernels_compile_up_to_32k_tokens(chip):
    """Forward and both passes, 512 to 32768 tokens; head dim 256 and float32 only on v4."""
    cases = CASES + (MORE if chip == "v4" else [])
    check(TOPOLOGIES[chip], compiled(TOPOLOGIES[chip], cases))
