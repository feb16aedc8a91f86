"""The reports of `plan` in docstrings and docs/planning.md, as far as they need no compiler."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from docstrings import files, find, layout, report

from monoformer_jax.planning import estimate
from monoformer_jax.planning.hardware import abstract

FILES = files()
# Lines that do not depend on what the compiler made.
QUICK = r"\S+ on |model FLOPs|  at \d+% of peak|hosts: |  packed rows: "


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reports_are_true(path, monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")

    def program(config, mesh, dtype):
        return jax.jit(lambda x: x @ x), (abstract(mesh, (256, 256), jnp.float32),)

    monkeypatch.setitem(estimate._PROGRAMS, "train", program)
    monkeypatch.chdir(ROOT)
    config, topology, _, said = find(path).groups()
    lines = [line for line in report.__wrapped__(config, topology) if re.match(QUICK, line)]
    assert len(lines) >= 4
    said = " ".join(said.split())
    for line in lines:
        assert " ".join(line.split()) in said, "run python tests/docstrings.py"
    share = re.search(r"packed rows: (\d+)% real tokens", said)
    assert share is None or int(share[1]) >= 95
    assert share is not None or path.stem.startswith("diffussm")


def test_a_report_is_replaced_and_nothing_else(tmp_path):
    for path in FILES:
        text, found = path.read_text(), find(path)
        lines = ["a on b:", "  memory  1", "word " * 40]
        copy = tmp_path / path.name
        copy.write_text(text[: found.start(4)] + layout(lines, path) + text[found.end(4) :])
        again = find(copy)
        assert again.groups()[:3] == found.groups()[:3]
        assert again[4].split() == " ".join(lines).split()
        assert copy.read_text()[again.end(4) :] == text[found.end(4) :]
