"""The benchmark of the state-space convolution: its rows, its errors, and a compilation for TPU."""

import json

import numpy as np
import pytest
from ssm_test import both_directions, make

from monoformer_jax.bench.__main__ import main
from monoformer_jax.bench.ssm import recurrence

SMALL = ["ssm", "--dim=4", "--batch=2", "--chunk=4", "--state_size=8"]


def rows_of(tmp_path, *arguments):
    file = tmp_path / "ssm.json"
    assert main([*SMALL, *arguments, f"--json={file}"]) == 0
    return json.loads(file.read_text())["rows"]


def test_rows_and_errors(tmp_path, capsys):
    rows = rows_of(tmp_path, "--lengths=16", "--repeats=1")
    forms = ["fft", "chunked", "attention"]
    assert [(row["form"], row["length"]) for row in rows] == [(form, 16) for form in forms]
    for row in rows:
        assert row["ms"] > 0 and row.get("max_error", 0) < 1e-5
    assert capsys.readouterr().out.count("max_error") == 2


def test_its_recurrence_is_that_of_the_tests():
    _, params = make()
    u = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    want = both_directions(params, u)[:, 0]
    np.testing.assert_allclose(recurrence(params["forward"], u), want, atol=1e-5)


@pytest.mark.slow
def test_compiles_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    for row in rows_of(tmp_path, "--lengths=16", "--chip=v5e:2x2"):
        assert row["gflops"] > 0 and row["bound_ms"] > 0
