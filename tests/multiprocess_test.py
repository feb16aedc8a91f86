"""Two and four real processes that train as one (gloo between them): same numbers, and what is left
when one of them is told to leave or is killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.cli import PREEMPTED
from monoformer_jax.training.loop import train

TIMEOUT = 600  # seconds; only a run that hangs takes long
STREAMS = "--config.data.streams=4"

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def free_port():
    """A port that nobody else gets while it is used: held by a socket that never listens."""
    with socket.socket(socket.AF_INET6) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("::", 0))
        yield held.getsockname()[1]


def run(count, workdir, *overrides, faults=None):
    """The train command in `count` processes; faults: {process: "KIND:STEP"}, see faulty_train.py.

    Returns exit codes and what each printed, stderr included. All end by themselves, or it fails.
    """
    with free_port() as port:
        processes = []
        for index in range(count):
            environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
            environment["PYTHONPATH"] = str(ROOT)
            if faults and index in faults:
                environment["FAULT"] = faults[index]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "tests/faulty_train.py", "--config=configs/digits.py:tiny",
                     STREAMS, f"--workdir={workdir}", f"--coordinator=localhost:{port}",
                     f"--processes={count}", f"--process={index}", *overrides],
                    cwd=ROOT, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        try:
            said = [process.communicate(timeout=TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
    return [process.returncode for process in processes], said


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The same run in one process."""
    import dataclasses

    workdir = tmp_path_factory.mktemp("one")
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, streams=4)), workdir)
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("four") / "run"
    codes, said = run(4, workdir)
    assert codes == [0] * 4, said
    return workdir, said


def test_four_processes_do_what_one_does_and_only_the_first_speaks(one, four):
    workdir, said = four
    assert "step 20/20" in said[0][0] and not any(out for out, _ in said[1:])
    np.testing.assert_allclose(losses(workdir)[0], losses(one)[0], rtol=1e-6)
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)
    assert json.loads((workdir / "done.json").read_text())["step"] == 20


@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpoint_of_four_processes_goes_on_with_fewer(one, four, tmp_path, count, change):
    """From step 10, over another mesh; the batches go on as if nothing had changed."""
    workdir = tmp_path / "fewer"
    shutil.copytree(four[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    if count == 1:
        train(change(data={"streams": 4}, mesh={"tensor": 2, "fsdp": 2}), workdir)
    else:
        codes, said = run(2, workdir, "--config.mesh.fsdp=2")
        assert codes == [0, 0] and "from step 10 to 20" in said[0][0], said
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)


def test_one_is_told_to_leave_then_one_is_killed_and_the_losses_are_those_of_a_quiet_run(tmp_path):
    """SIGTERM to one process: all save after the same step. SIGKILL: the other ends by itself."""
    longer = ["--config.steps=80", "--config.checkpoint_every=20"]
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    codes, said = run(2, quiet, *longer)
    assert codes == [0, 0], said

    draw = random.Random(0)
    codes, said = run(2, troubled, *longer, faults={1: f"SIGTERM:{draw.randrange(5, 15)}"})
    assert codes == [PREEMPTED, PREEMPTED], said
    steps = [int(path.name) for path in (troubled / "checkpoints").iterdir()]
    assert all(f"told to leave at step {max(steps)}, which is saved" in err for _, err in said)

    victim = draw.randrange(2)
    codes, said = run(2, troubled, *longer, faults={victim: f"SIGKILL:{draw.randrange(5, 15)}"})
    assert codes[victim] == -signal.SIGKILL, said
    assert codes[1 - victim] not in (0, PREEMPTED), said

    codes, said = run(2, troubled, *longer)
    assert codes == [0, 0], said
    np.testing.assert_array_equal(losses(troubled), losses(quiet))
