"""The Triton kernels without a GPU: interpreted for numbers, compiled for registers."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from attention_cases import CASES, assert_within_limits

HERE = pathlib.Path(__file__).parent
pytest.importorskip("triton", reason="triton is for Linux only")


def python(program: str, *arguments: str, **environment: str) -> str:
    """Output of a program of this directory, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FAST = ("groups of 4", "decode")


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([n for n in CASES if n not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "all others"],
)
def test_the_kernels_agree_with_the_dense_oracle(names):
    """The cases of the TPU kernel, interpreted."""
    found = json.loads(python("triton_interpreter.py", *names, TRITON_INTERPRET="1"))
    assert set(found) == set(names)
    for name in names:
        assert_within_limits(CASES[name], found[name])
