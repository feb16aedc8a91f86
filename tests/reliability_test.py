"""Nothing is lost and nothing is silently wrong: damage, two trainers, lost files, names and paths."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from faults_test import at_step, before_batch, some_state, train

from monoformer_jax import check as check_command
from monoformer_jax import errors
from monoformer_jax.config import MeshConfig
from monoformer_jax.data.documents import EndOfTurn
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.records import Records, write_file
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.parallel import make_mesh
from monoformer_jax.runtime import lock as locks
from monoformer_jax.runtime import processes
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.checksums import find_damage
from monoformer_jax.runtime.faults import CrashLoopGuard, storage_error
from monoformer_jax.runtime.lock import WorkdirLock
from monoformer_jax.runtime.workdir import (
    absolute_paths,
    claim_workdir,
    mark_done,
    portable_paths,
    read_config,
)
from monoformer_jax.training.metrics import Writer
from monoformer_jax.training.state import abstract_train_state


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """A workdir with checkpoints of random numbers at steps 10 and 20, on one device."""
    workdir = tmp_path_factory.mktemp("saved")
    claim_workdir(workdir, config)
    state = some_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    batches = Batches(config, ByteTokenizer())
    with Checkpoints(workdir, kept=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(at_step(state, step), batches.iterator, 1.5 * step)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def check(workdir, tmp_path):
    """Exit code and result of the check command."""
    file = tmp_path / "check.json"
    code = check_command.main(argparse.Namespace(workdir=epath.Path(workdir), json=file))
    return code, json.loads(file.read_text())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_of_an_array_is_found(run):
    folder = run / "checkpoints" / "20"
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    weights = np.array([path.stat().st_size for path in files], float)
    draw, found = np.random.default_rng(0), 0
    parts = {path: path.relative_to(folder).parts[0] for path in files}
    for number in draw.choice(len(files), 1000, p=weights / weights.sum()):
        path = files[number]
        bit = int(draw.integers(8 * path.stat().st_size))
        flip(path, bit)
        damage = find_damage(epath.Path(folder), [parts[path]])
        found += damage == f"{path.relative_to(folder)} differs from its checksum"
        flip(path, bit)
    assert found == 1000
    assert find_damage(epath.Path(folder)) == ""


def test_a_flipped_bit_in_any_file_is_found_or_harmless(run):
    folder, draw = run / "checkpoints" / "20", np.random.default_rng(1)
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    with Checkpoints(run) as checkpoints:
        for path in files:
            bit = int(draw.integers(8 * path.stat().st_size))
            flip(path, bit)
            unread = path.parent == folder and path.name in (
                "_CHECKPOINT_METADATA",
                "commit_success.txt",
            )
            assert bool(find_damage(epath.Path(folder))) != unread, path
            if unread:
                assert checkpoints.verify(20) == ""
            flip(path, bit)
    kinds = {path.relative_to(folder).parts[0] for path in files}
    assert kinds >= {"params", "ema", "optimizer", "data", "meta", "checksums.json"}


def swap(part):
    """Puts a part of checkpoint 10 into checkpoint 20; "." is the whole folder."""

    def damage(run):
        ours, theirs = (run / "checkpoints" / step / part for step in ("20", "10"))
        shutil.rmtree(ours)
        shutil.copytree(theirs, ours)

    return damage


def move_data(run):
    file = run / "checkpoints" / "20" / "data" / "metadata"
    text = file.read_text()
    states = json.loads(text)
    states["streams"]["0"]["moved"] = 1000
    file.write_text(json.dumps(states))


def cut_checksums(run):
    file = run / "checkpoints" / "20" / "checksums.json"
    os.truncate(file, file.stat().st_size // 2)


def remove_checksums(run):
    (run / "checkpoints" / "20" / "checksums.json").unlink()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (swap("."), "the folder holds step 10"),
        (swap("params"), "params/"),
        (move_data, "data/metadata has "),
        (cut_checksums, "checksums.json is damaged"),
        (remove_checksums, "checksums.json is missing"),
    ],
    ids=["another step", "another step's weights", "data", "cut checksums", "no checksums"],
)  # fmt: skip
def test_what_does_not_belong_to_a_checkpoint_is_damage(run, tmp_path, damage, reason):
    damage(run)
    code, result = check(run, tmp_path)
    assert code == 1 and not result["ok"]
    good, bad = result["checkpoints"]
    assert good == {"step": 10, "ok": True, "reason": ""}
    assert bad["step"] == 20 and not bad["ok"] and bad["reason"].startswith(reason)


def test_weights_that_are_not_finite_are_not_restored(config, run, tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, batches = some_state(config, mesh), Batches(config, ByteTokenizer())
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), state.ema)
    with Checkpoints(run, kept=3) as checkpoints:
        checkpoints.save(at_step(state.replace(ema=broken), 30), batches.iterator, 0.0)
        checkpoints.wait()
        assert "is not finite" in checkpoints.verify(30)
        with pytest.raises(InputError, match=r"checkpoint .*30 cannot be read.*ema not finite"):
            checkpoints.restore_ema(abstract_train_state(config, mesh).ema)
        got, _, damaged = checkpoints.restore(abstract_train_state(config, mesh), batches.iterator)
    assert int(got.step) == 20 and damaged == {30: "ema not finite"}
    assert (run / "damaged" / "30").is_dir()


def test_check_says_what_is_good_and_what_is_not(run, tmp_path, capsys):
    mark_done(run, read_config(run), 20, 1.0)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 2')  # a line that was cut off
    code, result = check(run, tmp_path)
    assert code == 0 and result["ok"] and not result["problems"]
    assert [found["step"] for found in result["checkpoints"]] == [10, 20]

    (run / "done.json").write_text('{"step": 20, "na')
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "?", *lines]) + "\n")
    (run / "config.json").write_text("{")
    code, result = check(run, tmp_path)
    assert code == 1 and all(found["ok"] for found in result["checkpoints"])
    said = "\n".join(result["problems"])
    for problem in ("done.json is damaged", "config.json is damaged", "line 2 is damaged",
                    "its steps do not increase"):  # fmt: skip
        assert problem in said
    assert "NOT GOOD" in capsys.readouterr().out
    with pytest.raises(InputError, match="is not a folder"):
        check(run / "none", tmp_path)


def test_a_save_that_cannot_be_read_is_an_error(config, tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        checkpoints.save(
            at_step(some_state(config, mesh), 5), Batches(config, ByteTokenizer()).iterator, 0
        )
        checkpoints._manager.wait_until_finished()
        (tmp_path / "checkpoints" / "5" / "params" / "manifest.ocdbt").unlink()
        with pytest.raises(RuntimeError, match=r"checkpoints/5 was saved, but cannot be read"):
            checkpoints.wait()


def test_what_killed_saves_and_writes_left_is_removed(config, run):
    half = run / "checkpoints" / "30.orbax-checkpoint-tmp"
    (half / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in ("metrics.jsonl", "trainer.json"):
        (run / f".{name}.123.new").write_text("half")
    claim_workdir(run, config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with Checkpoints(run, kept=2) as checkpoints:
        assert checkpoints.steps == [10, 20]
        checkpoints.save(
            at_step(some_state(config, mesh), 40), Batches(config, ByteTokenizer()).iterator, 0
        )
    assert not half.exists() and not list(run.glob("*.new"))


def lock_of(workdir, **changed):
    file = workdir / "trainer.json"
    owner = json.loads(file.read_text()) | changed
    file.write_text(json.dumps(owner))
    return owner


def test_a_workdir_has_one_trainer(tmp_path, monkeypatch, capsys):
    workdir = epath.Path(tmp_path / "new" / "run")
    with WorkdirLock(workdir) as first:
        with pytest.raises(InputError, match=rf"in use: process {os.getpid()} on .* trains in it"):
            WorkdirLock(workdir).__enter__()
        # Another trainer, on another machine, whose clock and process numbers mean nothing here.
        monkeypatch.setattr(locks, "_STALE", 0.4)
        monkeypatch.setattr(locks, "_BEAT", 0.4)
        monkeypatch.setattr(locks, "_SETTLE", 0.0)
        lock_of(workdir, token="theirs", process="other namespace 1 2", host="elsewhere", pid=7)
        codes = []
        monkeypatch.setattr(locks.os, "_exit", codes.append)
        first.check()
        assert codes == [errors.BAD_INPUT]
        assert "another trainer took it over" in capsys.readouterr().err
    assert (workdir / "trainer.json").exists()  # not ours to remove
    with WorkdirLock(workdir):  # whose heartbeat stands still
        assert "process 7 on elsewhere ended without removing its lock" in capsys.readouterr().err
    with contextlib.suppress(InputError), WorkdirLock(workdir / "other" / "run"):
        raise InputError("bad input")
    assert not (workdir / "other").exists()  # nothing stays


def test_a_lock_with_a_heartbeat_holds_and_that_of_a_dead_process_does_not(
    tmp_path, monkeypatch, capsys
):
    workdir = epath.Path(tmp_path)
    with WorkdirLock(workdir):
        owner = json.loads((workdir / "trainer.json").read_text())
    beats = iter(range(1, 100))
    monkeypatch.setattr(locks, "_BEAT", 0.1)
    monkeypatch.setattr(locks, "_SETTLE", 0.0)
    theirs = owner | {"process": "other namespace 1 2", "host": "elsewhere", "pid": 7}
    lock = WorkdirLock(workdir)
    monkeypatch.setattr(lock, "_read", lambda: theirs | {"beats": next(beats)})
    with pytest.raises(InputError, match="in use: process 7 on elsewhere"):
        lock.__enter__()
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    alive = locks._identity(dead.pid)
    (workdir / "trainer.json").write_text(json.dumps(owner | {"pid": dead.pid, "process": alive}))
    with pytest.raises(InputError, match=f"in use: process {dead.pid}"):
        WorkdirLock(workdir).__enter__()
    dead.kill()
    dead.wait()
    with WorkdirLock(workdir):
        assert f"process {dead.pid} on" in capsys.readouterr().err


def test_a_folder_belongs_to_a_run_from_its_first_checkpoint_on(config, run, change, tmp_path):
    new = tmp_path / "new"
    claim_workdir(new, change(seed=1))
    (new / "checkpoints").mkdir()
    (new / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    claim_workdir(new, config)  # the corrected command
    assert read_config(new).seed == config.seed
    assert (new / "metrics.1.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    with pytest.raises(InputError, match=r"holds another run: seed \(was 0, now 1\); nothing was"):
        claim_workdir(run, change(seed=1))


@pytest.mark.parametrize("file", ["metrics.jsonl", "done.json"])
def test_a_run_whose_checkpoints_vanished_does_not_start_again(config, run, file):
    (run / file).write_text('{"step": 15}\n')
    before = (run / "config.json").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="but no checkpoint: restore its folder checkpoints/"):
        claim_workdir(run, config)
    assert (run / file).read_text() == '{"step": 15}\n'
    assert (run / "config.json").read_bytes() == before


def test_cut_files_of_a_run(config, run, change):
    (run / "done.json").write_text('{"st')
    (run / "starts.json").write_text('{"starts": 3, "check')
    claim_workdir(run, config)
    assert not (run / "done.json").exists()  # written again at the end
    with CrashLoopGuard(epath.Path(run), 20):
        pass
    (run / "config.json").write_text((run / "config.json").read_text()[:100])
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        claim_workdir(run, config)


def test_bad_input_does_not_count_as_a_start_and_keeps_the_count(tmp_path):
    workdir = epath.Path(tmp_path)
    for error in (InputError("bad"), OSError("worse"), InputError("bad")):
        with contextlib.suppress(type(error)), CrashLoopGuard(workdir, None):
            raise error
    count = json.loads((workdir / "starts.json").read_text())["starts"]
    assert count == 1 and "worse" in (workdir / "errors" / "error_of_process_0.txt").read_text()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard
def test_metrics_are_repaired_and_damaged_lines_are_kept(tmp_path, capsys):
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3, 4)]
    lines = [line.encode() for line in lines]
    lines[1] = b"\xff" + lines[1][1:]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:-3])
    writer = Writer(tmp_path, 3)
    shutil.rmtree(tmp_path / "tensorboard", ignore_errors=True)
    writer.write_scalars(4, {"loss": 0.25})
    writer.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 3, 4] and found[-1]["loss"] == 0.25
    (kept,) = (tmp_path / "damaged").iterdir()
    assert kept.read_bytes() == lines[1] + b"\n" and "1 lines" in capsys.readouterr().err


def test_paths_do_not_depend_on_the_current_folder(tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = change(
        init_from="runs/base", data={"records": {"a": "rec", "b": "/far", "c": "gs://b/c"}}
    )
    stored = portable_paths("runs/lora", config)
    assert stored.init_from == "../base"
    assert stored.data.records == {"a": "../../rec", "b": "/far", "c": "gs://b/c"}
    claim_workdir("runs/lora", config)
    (tmp_path / "moved").mkdir()
    (tmp_path / "runs").rename(tmp_path / "moved" / "runs")
    monkeypatch.chdir("/")
    found = read_config(tmp_path / "moved" / "runs" / "lora")
    assert found.init_from == str(tmp_path / "moved" / "runs" / "base")
    assert found.data.records == {
        "a": str(tmp_path / "moved" / "rec"),
        "b": "/far",
        "c": "gs://b/c",
    }
    assert absolute_paths("gs://b/runs/x", stored).init_from == "gs://b/runs/base"
    assert portable_paths("gs://b/runs/x", config).init_from == "/runs/base"


def test_the_tokenizer_is_copied_into_the_workdir(run, config, tmp_path, change):
    file = tmp_path / "own.json"
    file.write_text("{}")
    own = change(data={"tokenizer": str(file)})
    claim_workdir(tmp_path / "new", own, file)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "new").data.tokenizer == "tokenizer.json"
    shutil.copytree(run / "checkpoints", tmp_path / "new" / "checkpoints")
    claim_workdir(tmp_path / "new", own, file)
    file.write_text("{ }")
    with pytest.raises(InputError, match=r"data\.tokenizer \(another file than"):
        claim_workdir(tmp_path / "new", own, file)


def test_names_with_brackets(tmp_path):
    folder = tmp_path / "cats [v2]"
    folder.mkdir()
    write_file(epath.Path(folder) / "records-0.array_record", [["hi", EndOfTurn()]])
    (folder / "info.json").write_text('{"examples": 1, "files": 1, "shape": null}')
    assert len(Records(str(folder))) == 1
    with pytest.raises(InputError, match=r"has \[ \] in its name: .* choose another folder"):
        train(folder / "run")
    assert not (folder / "run").exists()


def test_a_run_can_be_read_below_brackets(config, run, tmp_path):
    (tmp_path / "a [b]").mkdir()
    run.rename(tmp_path / "a [b]" / "run")
    assert check(tmp_path / "a [b]" / "run", tmp_path)[0] == 0


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_workdir_that_cannot_be_a_folder(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--workdir=.*file.* cannot be written: "):
        train(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_storage_errors_are_one_sentence():
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = ValueError(
        "RESOURCE_EXHAUSTED: Error writing: No space left on device [...]"
    )
    gone = FileNotFoundError(2, "No such file or directory", "/run/metrics.jsonl")
    for error in (full, wrapped, gone):
        assert "/run cannot be written or read: No s" in str(storage_error(error, "/run"))
    assert storage_error(FileNotFoundError(2, "No such file", "/data/a.jpg"), "/run") is None
    assert storage_error(ValueError("a bug"), "/run") is None


def test_processes_that_disagree_are_refused(monkeypatch):
    def others(**changed):
        return lambda value: [value, value | changed]

    monkeypatch.setattr(processes, "allgather_json", others())
    processes.require_agreement({"config.steps": 20})
    monkeypatch.setattr(
        processes, "allgather_json", others(**{"config.optimizer.learning_rate": 0.5})
    )
    said = (
        r"process 1 has config\.optimizer\.learning_rate=0\.5, but process 0 has 0\.001: start the"
    )
    with pytest.raises(InputError, match=said):
        processes.require_agreement({"config.optimizer.learning_rate": 0.001})
    monkeypatch.setattr(
        processes, "allgather_json", others(**{"the code of monoformer_jax": "old"})
    )
    with pytest.raises(InputError, match="process 1 has the code of monoformer_jax='old'"):
        processes.require_agreement({})


def test_a_process_that_is_started_twice_is_refused():
    processes._require_single("localhost:1", 1)
    held = processes._name
    with pytest.raises(
        InputError, match="--process=1 of --coordinator=localhost:1 was started twice"
    ):
        processes._require_single("localhost:1", 1)
    held.close()
    processes._require_single("localhost:1", 1)
    processes._name.close()


@pytest.mark.slow
def test_ctrl_c_saves_and_a_hang_of_the_last_save_is_ended(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_batch(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(tmp_path) == errors.PREEMPTED
    assert "at step 7, which is saved" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]
    assert not (tmp_path / "trainer.json").exists()

    ended = []
    monkeypatch.setattr("monoformer_jax.runtime.faults.os._exit", ended.append)

    def hang(self):
        while not ended:
            time.sleep(0.05)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", hang)
        assert train(tmp_path, "--config.checkpoint_every=40", "--config.watchdog_seconds=2") == 130
    assert ended == [errors.HUNG]
