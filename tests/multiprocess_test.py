"""Runs of two and four real processes (gloo): the same numbers as one process, and the files that
remain after one of them receives SIGTERM or SIGKILL."""

import argparse
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
import PIL.Image
import pytest
from conftest import ROOT

from monoformer_jax import sample
from monoformer_jax.cli import load_config
from monoformer_jax.data.documents import Image
from monoformer_jax.data.records import write_records
from monoformer_jax.errors import PREEMPTED
from monoformer_jax.evaluation.validation import Validation
from monoformer_jax.training.loop import train

TIMEOUT = 600  # seconds; only a run that hangs takes so long
TINY = "configs/digits.py:tiny"
# The learning rate must not depend on the number of steps, which differs between the runs.
OVERRIDES = ["--config.data.streams=4", "--config.optimizer.schedule=constant"]
# Compilation is half of the time: on a CPU only process 0 uses jax's compilation cache.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def free_port():
    """A reserved TCP port: a socket that never listens stays bound to it."""
    with socket.socket(socket.AF_INET6) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("::", 0))
        yield held.getsockname()[1]


def start(count, *command, faults=None):
    """Runs the command in `count` processes; faults: {process: "SIGNAL:BATCH"}, see faulty_train.py.

    Returns the exit codes and the (stdout, stderr) of each. All must exit by themselves.
    """
    processes = []
    with free_port() as port:
        for index in range(count):
            environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
            environment["FAULT"] = (faults or {}).get(index, "")
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command, f"--coordinator=localhost:{port}",
                     f"--processes={count}", f"--process={index}"],
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


def run(count, workdir, *overrides, faults=None):
    """Runs the train command, see `start`."""
    return start(count, "tests/faulty_train.py", f"--config={TINY}", *OVERRIDES,
                 f"--workdir={workdir}", *overrides, faults=faults)  # fmt: skip


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process, on four devices."""
    workdir = tmp_path_factory.mktemp("one")
    train(load_config(str(ROOT / TINY), OVERRIDES), workdir)
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The run in four processes of one device each, and what they printed."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    codes, said = run(4, workdir)
    assert codes == [0] * 4, said
    return workdir, said


@pytest.fixture
def half(four, tmp_path):
    """Copies the run of four processes as of its checkpoint at step 10."""

    def copy(name):
        shutil.copytree(four[0], tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "20")
        return tmp_path / name

    return copy


def test_four_processes_match_one_and_only_process_0_prints(one, four):
    workdir, said = four
    assert "step 20/20" in said[0][0] and not any("step" in out for out, _ in said[1:])
    np.testing.assert_allclose(losses(workdir)[0], losses(one)[0], rtol=1e-6)
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)
    assert json.loads((workdir / "done.json").read_text())["step"] == 20


def test_one_process_resumes_a_checkpoint_of_four(one, half):
    workdir = half("alone")
    train(load_config(str(ROOT / TINY), OVERRIDES), workdir)
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)


def test_two_processes_resume_four_and_survive_sigterm_and_sigkill_bit_exact(one, half):
    """On another mesh. SIGTERM to one: both save after the same step. SIGKILL: the other exits too."""
    longer = ["--config.steps=60", "--config.checkpoint_every=20", "--config.mesh.fsdp=2"]
    uninterrupted, interrupted = half("uninterrupted"), half("interrupted")
    codes, said = run(2, uninterrupted, *longer)
    assert codes == [0, 0] and "from step 10 to 60" in said[0][0], said
    np.testing.assert_allclose(losses(uninterrupted)[:20], losses(one), rtol=1e-4)

    draw = random.Random(0)
    codes, said = run(2, interrupted, *longer, faults={1: f"SIGTERM:{draw.randrange(3, 9)}"})
    assert codes == [PREEMPTED, PREEMPTED], said
    saved = max(int(path.name) for path in (interrupted / "checkpoints").iterdir())
    for _, err in said:
        assert f"preempted at step {saved}, which is saved" in err

    victim = draw.randrange(2)
    codes, said = run(2, interrupted, *longer, faults={victim: f"SIGKILL:{draw.randrange(3, 9)}"})
    assert codes[victim] == -signal.SIGKILL, said
    assert codes[1 - victim] not in (0, PREEMPTED), said

    codes, said = run(2, interrupted, *longer)
    assert codes == [0, 0], said
    np.testing.assert_array_equal(losses(interrupted), losses(uninterrupted))


def test_two_processes_measure_and_draw_what_one_does_and_the_first_writes(tmp_path):
    """Held-out losses, samples and answers, with parameters sharded over the processes; and what the
    streams of both skipped, here every second example of a source."""
    sides = [8, 4] * 10
    images = ([Image(np.zeros((side, side, 1), np.uint8), True)] for side in sides)
    write_records(tmp_path / "mine", images)
    given = ["--config.steps=4", "--config.checkpoint_every=4", "--config.validation.every=4",
             "--config.data.validation_split=0.2", "--config.validation.samples=3",
             "--config.validation.rows=6", "--config.sampling.steps=2",
             f"--config.data.records.mine={tmp_path / 'mine'}", "--config.data.mixture.mine=1",
             "--config.data.max_bad_fraction=0.9"]  # fmt: skip
    config = load_config(str(ROOT / TINY), [*OVERRIDES, *given])
    train(config, tmp_path / "one", open_validation=Validation)
    codes, said = run(2, tmp_path / "two", *given, "--config.mesh.fsdp=2")
    assert codes == [0, 0], said
    assert "validation at step 4" in said[0][0] and "validation" not in said[1][0]
    one, two = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two[-1]["skipped_size"] == one[-1]["skipped_size"] > 0
    for a, b in zip(one, two, strict=True):
        for key in (key for key in a if key.startswith("val_")):
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
    for step in (0, 4):
        drawn = [PIL.Image.open(tmp_path / n / "samples" / f"{step}.png") for n in ("one", "two")]
        assert np.abs(np.subtract(*(np.asarray(x, int) for x in drawn))).max() <= 2  # of 255
    assert (tmp_path / "two" / "report.html").exists()


def test_two_processes_sample_the_missing_shards_and_the_first_joins_them(one, tmp_path):
    """Process 0 of 3 has already written shards 0 and 6 of the shards 0, 2, … 8."""

    def arguments(out):
        return [f"--workdir={one}", "--prompt=draw a one", "--prompt=draw a two", "--total=9",
                "--batch=2", "--steps=1", f"--out={tmp_path / out}"]  # fmt: skip

    def alone(out, *more):
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser)
        assert sample.main(parser.parse_args([*arguments(out), *more])) == 0

    def samples(out):
        with np.load(tmp_path / out / "samples.npz") as arrays:
            return arrays["arr_0"].astype(int)

    def shards():
        files = sorted((tmp_path / "two").glob("0*.npz"))
        return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}

    alone("one", "--processes=1")
    alone("two", "--processes=3", "--process=0")
    before = shards()
    assert sorted(before) == ["00000000.npz", "00000006.npz"]

    command = ["-m", "monoformer_jax.sample", *arguments("two")]
    codes, said = start(2, *command)
    assert codes == [0, 0], said
    after = shards()
    assert sorted(after) == [f"{first:08d}.npz" for first in range(0, 10, 2)]
    assert {name: after[name] for name in before} == before
    # Process 0 generates shards 4 and 8, process 1 only shard 2: 0 and 6 exist.
    folder = tmp_path / "two"
    first, second = (
        [line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said
    )
    assert first == [
        f"{folder}: 2 of 5 shards exist already", "shard 1/2: images 4 to 5",
        "shard 2/2: images 8 to 8", f"9 images in {folder / 'samples.npz'}",
    ]  # fmt: skip
    assert second == []
    want = samples("one")
    assert want.shape == (9, 8, 8, 3) and len(np.unique(want, axis=0)) == 9
    assert np.abs(samples("two") - want).max() <= 1  # of 255: another number of devices


def test_two_processes_encode_a_dataset_together(tmp_path):
    """Each writes every second file; both end when the folder is complete."""
    lines = [json.dumps({"messages": [f"question {i}", f"answer {i}"]}) for i in range(9)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines) + "\n")
    command = ["-m", "monoformer_jax.prepare_data", f"--from={tmp_path / 'talks.jsonl'}",
               f"--to={tmp_path / 'records'}", "--per_file=2"]  # fmt: skip
    codes, said = start(2, *command)
    assert codes == [0, 0], said
    assert "9 examples in 5 files" in said[0][0] and "examples" not in said[1][0]
    info = json.loads((tmp_path / "records" / "info.json").read_text())
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "records").glob("*.array_record")}
    assert info == {"examples": 9, "files": 5, "shape": None, "bytes": sizes}
