"""Every way a run can end early: its exit code, the files it leaves, and how it resumes."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from monoformer_jax import errors
from monoformer_jax import train as command
from monoformer_jax.config import MeshConfig
from monoformer_jax.data.pipeline import Batches, RowIterator
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.parallel import make_mesh
from monoformer_jax.runtime import faults
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.faults import CrashLoop, CrashLoopGuard, Preempted, Watchdog
from monoformer_jax.runtime.processes import start_processes
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.runtime.workdir import claim_workdir, mark_done, read_config
from monoformer_jax.training.metrics import Writer
from monoformer_jax.training.state import abstract_train_state


def train(workdir, *overrides):
    """Runs the train command in this process and returns its exit code."""
    return command.main(
        argparse.Namespace(
            config=str(ROOT / "configs" / "digits.py:tiny"), overrides=list(overrides),
            workdir=epath.Path(workdir), coordinator=None, processes=1, process=None,
            inspect=None,
        )
    )  # fmt: skip


def before_batch(monkeypatch, number, action):
    """Runs `action` before this batch is read; the check before the run reads batch 0."""
    whole, asked = RowIterator.__next__, iter(range(0, 10_000))

    def faulty(self):
        if next(asked) == number:
            action()
        return whole(self)

    monkeypatch.setattr(RowIterator, "__next__", faulty)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run, with checkpoints 10 and 20."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert train(workdir) == 0
    assert json.loads((workdir / "done.json").read_text()).items() >= {
        "step": 20, "name": "digits"}.items()  # fmt: skip
    assert not (workdir / "starts.json").exists()
    return workdir


@pytest.mark.slow
def test_sigterm_saves_and_the_run_resumes_bit_exact(uninterrupted, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        before_batch(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == errors.PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert "preempted at step 7, which is saved" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]
    assert json.loads((tmp_path / "starts.json").read_text())["starts"] == 0
    assert not (tmp_path / "done.json").exists()
    assert train(tmp_path) == 0
    assert losses(tmp_path) == losses(uninterrupted)
    for a, b in zip(
        *(jax.tree.leaves(load_trained(path)[1]) for path in (tmp_path, uninterrupted))
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_previous_with_a_warning(
    uninterrupted, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    damage(workdir / "checkpoints" / "20", "truncated")
    assert train(workdir) == 0
    said = capsys.readouterr()
    assert "WARNING: checkpoint 20 could not be read" in said.err
    assert "resuming from step 10" in said.err and "from step 10 to 20" in said.out
    assert losses(workdir) == losses(uninterrupted)
    assert (workdir / "damaged" / "20").is_dir() and (workdir / "checkpoints" / "20").is_dir()


@pytest.mark.slow
def test_the_watchdog_ends_a_run_whose_source_hangs(tmp_path, monkeypatch, capsys):
    codes, woken = [], threading.Event()

    def fake_exit(code):  # os._exit would end pytest too
        codes.append(code)
        woken.set()

    def hang():
        woken.wait(300)
        raise SystemExit

    monkeypatch.setattr(faults.os, "_exit", fake_exit)
    before_batch(monkeypatch, 4, hang)
    with pytest.raises(SystemExit):
        train(tmp_path, "--config.watchdog_seconds=5")
    assert codes == [errors.HUNG]
    assert "no step completed within watchdog_seconds=5" in capsys.readouterr().err
    assert "in hang" in (tmp_path / "errors" / "hang_of_process_0.txt").read_text()


def test_the_watchdog_gives_the_first_step_time_to_compile(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(faults.os, "_exit", codes.append)
    with Watchdog(0.05, epath.Path(tmp_path), 5) as watchdog:
        time.sleep(0.2)
        assert codes == []
        watchdog.beat()
        watchdog._thread.join(60)
        assert codes == [5]
    with Watchdog(0.0, epath.Path(tmp_path), 5) as watchdog:
        assert not watchdog._thread.is_alive()


HOLDS_THE_GIL = """
import ctypes, sys
from etils import epath
from monoformer_jax.runtime import faults

faults._WRITE_SECONDS = 0.2
with faults.Watchdog(0.4, epath.Path(sys.argv[1]), 5) as watchdog:
    watchdog.beat()
    ctypes.PyDLL(None).sleep(60)  # no Python thread can run
"""


def test_the_watchdog_ends_a_process_that_holds_the_gil(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_GIL, str(tmp_path)], capture_output=True, text=True,
        cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and 'File "<string>", line 9' in ended.stderr


def crash(workdir, checkpoint, error):
    with pytest.raises(type(error)), CrashLoopGuard(workdir, checkpoint):
        raise error


def test_three_starts_without_a_checkpoint_are_a_crash_loop(tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    for _ in range(2):
        crash(workdir, 10, OSError("disk on fire"))
    crash(workdir, 10, Preempted())  # preemptions and interrupts do not count
    crash(workdir, 10, KeyboardInterrupt())
    crash(workdir, 20, OSError("a checkpoint later"))  # the count restarts
    for _ in range(2):
        crash(workdir, 20, OSError("disk on fire"))
    with pytest.raises(CrashLoop, match=r"3 consecutive starts .* after checkpoint 20"):
        CrashLoopGuard(workdir, 20)
    assert "disk on fire" in (workdir / "errors" / "error_of_process_0.txt").read_text()
    (workdir / "starts.json").unlink()
    with CrashLoopGuard(workdir, 20):
        pass
    assert not (workdir / "starts.json").exists()


def test_a_crash_loop_has_its_own_exit_code(tmp_path, capsys):
    """Three starts killed from outside, which only updated the count; no step is compiled."""
    (tmp_path / "starts.json").write_text('{"starts": 3, "checkpoint": null}')
    assert train(tmp_path) == errors.CRASH_LOOP == 4
    said = capsys.readouterr().err
    assert "no new checkpoint after step 0" in said
    assert f"remove {tmp_path / 'starts.json'}" in said and str(tmp_path / "errors") in said


def some_state(config, mesh, seed=0):
    """A train state of random numbers, without compilation."""
    draw = np.random.default_rng(seed)

    def make(a):
        return jax.device_put(np.asarray(100 * draw.standard_normal(a.shape), a.dtype), a.sharding)

    return jax.tree.map(make, abstract_train_state(config, mesh))


def at_step(state, step):
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """A workdir with checkpoints of random numbers at steps 10 and 20, written by four devices."""
    workdir = tmp_path_factory.mktemp("saved")
    claim_workdir(workdir, config)
    state = some_state(config, make_mesh(MeshConfig()))
    batches = Batches(config, ByteTokenizer())
    with Checkpoints(workdir, kept=2) as checkpoints:
        for step in (10, 20):
            next(batches.iterator)
            checkpoints.save(at_step(state, step), batches.iterator, 1.5 * step)
    return workdir, state, next(batches.iterator)


@pytest.mark.parametrize("axes", [(1, 2, 2), None])
def test_a_checkpoint_is_restored_exactly_on_another_mesh(config, saved, axes):
    workdir, state, following = saved
    mesh = make_mesh(
        MeshConfig(*axes) if axes else MeshConfig(), None if axes else jax.devices()[:1]
    )
    batches = Batches(config, ByteTokenizer())
    target = abstract_train_state(config, mesh)
    with Checkpoints(workdir) as checkpoints:
        got, seconds, damaged = checkpoints.restore(target, batches.iterator)
    assert int(got.step) == 20 and seconds == 30 and not damaged
    for a, b, want in zip(*map(jax.tree.leaves, (got, at_step(state, 20), target))):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == want.sharding
    np.testing.assert_array_equal(next(batches.iterator)["tokens"], following["tokens"])


def test_the_ema_alone_is_loaded_in_bfloat16(saved):
    workdir, state, _ = saved
    _, ema, meta = load_trained(workdir, dtype="bfloat16")
    assert meta["step"] == 20
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(state.ema)):
        assert a.dtype == jnp.bfloat16 and len(a.devices()) == 1
        np.testing.assert_array_equal(a, np.asarray(b).astype(jnp.bfloat16))


def damage(checkpoint, how):
    if how == "truncated":
        largest = max(checkpoint.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif (checkpoint / how).is_dir():
        shutil.rmtree(checkpoint / how)
    else:
        (checkpoint / how).write_text("{")


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        pytest.param("params/manifest.ocdbt", marks=pytest.mark.slow),
        pytest.param("optimizer", marks=pytest.mark.slow),
        pytest.param("data/metadata", marks=pytest.mark.slow),
        "meta/metadata",
    ],
)
def test_any_damage_falls_back_to_the_previous_checkpoint(config, saved, tmp_path, how):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    damage(workdir / "checkpoints" / "20", how)
    (workdir / "damaged" / "20").mkdir(parents=True)  # from an earlier damage
    batches, target = (
        Batches(config, ByteTokenizer()),
        abstract_train_state(config, make_mesh(MeshConfig())),
    )
    with Checkpoints(workdir, kept=2) as checkpoints:
        state, _, damaged = checkpoints.restore(target, batches.iterator)
        assert int(state.step) == 10 and list(damaged) == [20] and damaged[20]
        assert checkpoints.latest == 10
        assert (workdir / "damaged" / "20.1").is_dir()
        np.testing.assert_array_equal(state.params["text_head"], saved[1].params["text_head"])
        # If the last one is damaged too, it is an error, and nothing is restarted or moved.
        damage(workdir / "checkpoints" / "10", how)
        with pytest.raises(InputError, match=r"no checkpoint in .* can be read; none was moved"):
            checkpoints.restore(target, batches.iterator)
        assert (workdir / "checkpoints" / "10").is_dir()


def test_a_storage_error_is_not_damage(config, saved, monkeypatch):
    def unavailable(*_):
        raise ValueError("UNAVAILABLE: the storage is temporarily unavailable")

    monkeypatch.setattr("monoformer_jax.runtime.checkpoint._read_arrays", unavailable)
    target = abstract_train_state(config, make_mesh(MeshConfig()))
    with Checkpoints(saved[0]) as checkpoints, pytest.raises(ValueError, match="UNAVAILABLE"):
        checkpoints.restore(target, Batches(config, ByteTokenizer()).iterator)
    assert not (saved[0] / "damaged").exists()


@pytest.mark.slow
def test_which_checkpoints_are_kept(config, tmp_path):
    state = some_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    batches = Batches(config, ByteTokenizer())
    with Checkpoints(tmp_path, kept=1, keep_every=20) as checkpoints:
        for step in (10, 20, 30, 40, 50):
            checkpoints.save(at_step(state, step), batches.iterator, 0.0)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 40, 50]


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/run, in memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, MemoryFileSystem)
    yield epath.Path("gs://bucket/run")
    MemoryFileSystem.store.clear()


def test_everything_but_arrays_can_be_written_to_a_bucket(bucket, change):
    claim_workdir(bucket, change(steps=20))
    assert read_config(bucket).steps == 20
    mark_done(bucket, change(steps=20), 20, 1.0)
    (bucket / "checkpoints" / "20" / "commit_success.txt").write_text("orbax's mark")
    claim_workdir(bucket, change(steps=40))
    assert not (bucket / "done.json").exists()
    for start in (0, 1):
        writer = Writer(bucket, start)
        writer.write_scalars(start + 1, {"loss": 0.5})
        writer.write_scalars(start + 2, {"loss": 0.25})
        writer.flush()
        writer.close()
    lines = (bucket / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    crash(bucket, None, OSError("no"))
    assert json.loads((bucket / "starts.json").read_text())["starts"] == 1
    assert list((bucket / "tensorboard").iterdir())
    assert "OSError: no" in (bucket / "errors" / "error_of_process_0.txt").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, 2, None), "must be given together"),
        (("localhost:1", None, 0), "must be given together"),
        (("localhost", 2, 0), "--coordinator=localhost is not HOST:PORT"),
        (("localhost:1", 2, 2), "--process=2 is not between 0 and --processes=2 - 1"),
    ],
)
def test_inconsistent_process_arguments_are_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        start_processes(*arguments)


def test_one_process_alone_skips_cluster_detection():
    start_processes(None, 1, None)
    assert jax.process_count() == 1
