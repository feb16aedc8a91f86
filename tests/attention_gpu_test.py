"""The Triton kernels without a GPU: numerics in the interpreter, register spills by compiling."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from attention_cases import CASES, assert_within_limits

from monoformer_jax.attention import IntervalMask
from monoformer_jax.attention.gpu_kernel import gpu_attention

HERE = pathlib.Path(__file__).parent
pytest.importorskip("triton", reason="triton is for Linux only")


def python(program: str, *arguments: str, **environment: str) -> str:
    """Runs a program of this directory in a separate process and returns its output."""
    done = subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FAST = ("decode",)


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([n for n in CASES if n not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "all others"],
)
def test_kernels_agree_with_dense_attention(names):
    """The same cases as for the TPU kernel, in the Triton interpreter."""
    found = json.loads(
        python("triton_interpreter.py", *names, TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")
    )
    # A noised copy attends as the last image of a page that is cut after it.
    assert 0 < found.pop("noised copies") < 1e-5
    assert set(found) == set(names)
    for name in names:
        assert_within_limits(CASES[name], found[name])


# Shared memory limit of a program in KiB, by compute capability.
SHARED = {75: 64, 80: 163, 90: 227, 100: 227}


TARGETS = [
    (75, "bfloat16", 64, 128),
    (80, "bfloat16", 64, 128),
    (80, "float32", 64, 128),
    (90, "bfloat16", 128),
    (100, "bfloat16", 64, 128),
]


@pytest.mark.parametrize(
    "target",
    [(90, "bfloat16", 64), *(pytest.param(target, marks=pytest.mark.slow) for target in TARGETS)],
    ids=str,
)
def test_kernels_compile_without_spilling(target):
    """Cubins for a T4 (7.5), A100 (8.0), H100 (9.0) and B200 (10.0) at the default tiles."""
    capability, *_ = target
    found = json.loads(python("triton_compile.py", *map(str, target)))
    assert len(found) == 3 * len(target[2:])
    for name, head_dim, cubin, spill, shared in found:
        assert cubin > 0 and spill == 0, f"{name}, head dim {head_dim}: {spill} bytes spilled"
        assert shared <= SHARED[capability] * 1024, f"{name}, head dim {head_dim}: {shared} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_head_dim_256_compiles(capability):
    """Spilling is allowed: no tile avoids it in every kernel."""
    found = json.loads(python("triton_compile.py", str(capability), "bfloat16", "256"))
    limit = SHARED[capability] * 1024
    assert all(cubin > 0 and shared <= limit for _, _, cubin, _, shared in found)


def test_missing_extra_and_unsupported_devices_raise(monkeypatch):
    """There is no silent fallback to a slower implementation."""
    monkeypatch.setitem(sys.modules, "triton.language", None)
    q = jnp.zeros((1, 128, 2, 64))
    rows = IntervalMask(*[jnp.zeros((1, 128), jnp.int32)] * 2)
    with pytest.raises(
        ValueError, match=r"'gpu' needs triton.language; install the extra \[cuda\]"
    ):
        gpu_attention(q, q, q, rows, capability=90)
    with pytest.raises(ValueError, match=r"capability 7\.0 is below 7\.5"):
        gpu_attention(q, q, q, rows, capability=70)
    q = jnp.zeros((1, 128, 2, 256))
    with pytest.raises(
        ValueError, match=r"head dim 256 needs more .* capability 7\.5; impl 'dense'"
    ):
        gpu_attention(q, q, q, rows, capability=75)
