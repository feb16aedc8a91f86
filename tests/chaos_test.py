"""A minute of faults drawn from a seed, see chaos.py."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_minute_of_faults_loses_nothing():
    done = subprocess.run(
        [sys.executable, "tests/chaos.py", "--seconds=60", "--seed=0"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"(\d+) faults, (\d+) survived, 0 lost", done.stdout.splitlines()[-1])
    assert found and found[1] == found[2] and int(found[1]) > 0, done.stdout
