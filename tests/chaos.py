"""Breaks runs on purpose and checks that they end as if nothing had happened; also a command.

  python tests/chaos.py --seconds=600 --seed=1

Every run is a trainer of its own with 40 steps and a checkpoint at every fifth: the real one, except
that the step is replaced by arithmetic on parameters and batch that needs no compiler. Faults are drawn
from a seed. A run survives if it ends with exactly the metrics of an uninterrupted one and with
checkpoints that `check` finds good; a fault that must be refused, if it ends with exit code 2.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Children are forked, which saves the import; no backend of jax runs in this process.
import jax
import numpy as np
from etils import epath

from monoformer_jax import check, train
from monoformer_jax.errors import BAD_INPUT, CRASH_LOOP, InputError
from monoformer_jax.training import loop
from monoformer_jax.training.metrics import TrainMetrics

ROOT = Path(__file__).parent.parent
OVERRIDES = ["--config.steps=40", "--config.checkpoint_every=5", "--config.data.streams=2"]
# Of the values of metrics.jsonl, those that differ between two runs.
MEASURED = {
    "step_ms",
    "tokens_per_s",
    "images_per_s",
    "data_wait_share",
    "memory_gib",
    "train_seconds",
}
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def arguments(workdir, *overrides, process=None, port=0):
    return argparse.Namespace(
        config=str(ROOT / "configs" / "digits.py:tiny"), overrides=[*OVERRIDES, *overrides],
        workdir=epath.Path(workdir), coordinator=None if process is None else f"localhost:{port}",
        processes=1 if process is None else 2, process=process, inspect=None,
    )  # fmt: skip


def fork(action, log):
    """Runs `action` in a forked process and returns its id; it exits with the code of the action."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            code = action() or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = BAD_INPUT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def kill_at(count, path, text=""):
    """Kills this process before write number `count` below `path` of those that name `text`."""
    seen = 0

    def hook(event, values):
        nonlocal seen
        if event not in WRITES or (
            event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        named = " ".join(map(str, values[:2]))
        if str(path) in named and text in named:
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def replace_step():
    """Replaces initialisation and step, whose losses still depend on parameters, step and batch."""

    def put(value, like):
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    def init(config, mesh):
        target, draw = loop.abstract_train_state(config, mesh), np.random.default_rng(0)
        return jax.tree.map(
            lambda a: put(np.asarray(draw.random(a.shape), a.dtype), a), target
        ).replace(step=put(np.zeros((), np.int32), target.step))

    def make_step(config, mesh):
        def step(state, batch):
            seen = float(np.asarray(batch["tokens"].addressable_shards[0].data).sum())
            leaf = state.params["text_head"]
            value = np.asarray(leaf.addressable_shards[0].data).flat[0]
            value = np.float32((value * 1.37 + seen * 1e-4 + int(state.step)) % 1)
            params = state.params | {"text_head": put(np.full(leaf.shape, value, leaf.dtype), leaf)}
            names = ("loss", "text_loss", "image_loss", "grad_norm", "param_norm", "learning_rate",
                     "real_token_share")  # fmt: skip
            metrics = TrainMetrics.single_from_model_output(**dict.fromkeys(names, value))
            number = put(np.int32(int(state.step) + 1), state.step)
            return state.replace(step=number, params=params, ema=params), metrics

        return step

    loop.init_train_state, loop.make_train_step = init, make_step


class Chaos:
    def __init__(self, folder, seed, seconds):
        self.folder, self.draw, self.seconds = folder, random.Random(seed), seconds
        self.log = folder / "log"
        self.faults, self.lost, self.kinds = 0, [], collections.Counter()
        self.ends = time.monotonic() + seconds
        started = time.monotonic()
        self.finish(folder / "reference")
        self.run_seconds = time.monotonic() - started
        self.reference = self.metrics(folder / "reference")
        assert [line["step"] for line in self.reference] == list(range(1, 41))

    def metrics(self, workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [{name: line[name] for name in line.keys() - MEASURED} for line in lines]

    def start(self, workdir, *overrides, before=None, real_step=False, **more):
        def action():
            if not real_step:
                replace_step()
            if before:
                before()
            return train.main(arguments(workdir, *overrides, **more))

        return fork(action, self.log)

    def wait(self, pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def finish(self, workdir):
        """Starts the run until it is done; returns its exit code."""
        code = self.wait(self.start(workdir))
        if code == CRASH_LOOP:  # three kills in a row: its message says what to do
            (workdir / "starts.json").unlink()
            code = self.wait(self.start(workdir))
        return code

    def survive(self, kind, workdir, faults=1):
        """Finishes a run and compares it with the uninterrupted one."""
        code = self.finish(workdir)
        good = code == 0 and (workdir / "done.json").exists()
        good = good and self.metrics(workdir) == self.reference
        checked = argparse.Namespace(workdir=epath.Path(workdir), json=None)
        good = good and self.wait(fork(lambda: check.main(checked), self.log)) == 0
        leftovers = [
            p.name for p in workdir.iterdir() if p.name.endswith(".new") or p.name == "trainer.json"
        ]
        self.count(
            kind, good and not leftovers, f"{workdir} ended with {code}, {leftovers}", faults
        )
        if good:
            shutil.rmtree(workdir)

    def count(self, kind, good, detail, faults=1):
        self.faults += faults
        self.kinds[kind] += faults
        if not good:
            self.lost.append(f"{kind}: {detail}")
        print(f"{kind}: {'survived' if good else f'LOST, {detail}'}", flush=True)

    def kill(self, workdir):
        """Kills a run at a random moment or write; returns whether it was still going."""
        if self.draw.random() < 0.5:
            pid = self.start(workdir)
            time.sleep(self.draw.uniform(0, self.run_seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            number = self.draw.randrange(1, 600)  # of about 750 in a run
            pid = self.start(workdir, before=lambda: kill_at(number, workdir))
        code = self.wait(pid)
        if code == CRASH_LOOP:
            (workdir / "starts.json").unlink()
        return code == -signal.SIGKILL

    def kills(self, workdir):
        killed = sum([self.kill(workdir) for _ in range(self.draw.randrange(3, 7))])
        self.survive("kill", workdir, killed)

    def kill_while_compiling(self, workdir):
        pid = self.start(workdir, real_step=True)
        while not (workdir / "config.json").exists():
            time.sleep(0.02)
        time.sleep(self.draw.uniform(0, 3))
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)
        if (workdir / "metrics.jsonl").exists():  # the real step was quicker, and has other losses
            shutil.rmtree(workdir)
            self.kill(workdir)
        self.survive("kill while compiling", workdir)

    def half_written(self, workdir):
        """Has checkpoints 35 and 40, the last of which then has to be written again."""
        self.finish(workdir)
        (workdir / "done.json").unlink()
        return workdir / "checkpoints" / "40"

    def bit_flip(self, workdir):
        newest = self.half_written(workdir)
        part = self.draw.choice(["params", "ema", "optimizer", "data", "meta", "checksums.json"])
        files = (
            [newest / part]
            if "." in part
            else [p for p in (newest / part).rglob("*") if p.is_file()]
        )
        path = self.draw.choice([path for path in files if path.stat().st_size])
        content = bytearray(path.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        self.survive(f"bit flip in {part}", workdir)

    def killed_quarantine(self, workdir):
        newest = self.half_written(workdir)
        (newest / "meta" / "metadata").write_text("{}")
        number = self.draw.randrange(1, 3)
        self.wait(self.start(workdir, before=lambda: kill_at(number, workdir, "damaged")))
        self.survive("kill in the quarantine", workdir, 2)

    def cut_files(self, workdir):
        self.half_written(workdir)
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write('{"step": 41, "lo')
        (workdir / "starts.json").write_text('{"star')
        (workdir / "done.json").write_text('{"st')
        self.survive("cut metrics, starts and done", workdir, 3)

    def second_trainer(self, workdir):
        first = self.start(workdir)
        while not (workdir / "metrics.jsonl").exists():
            time.sleep(0.05)
        code = self.wait(self.start(workdir))
        ended = self.wait(first)
        refused = code == BAD_INPUT or (code == 0 and (workdir / "done.json").exists())
        self.count("second trainer", refused and ended == 0, f"exit codes {ended} and {code}", 0)
        self.survive("second trainer", workdir)

    def disagreement(self, workdir):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        other = self.draw.choice(["--config.optimizer.learning_rate=0.5", "--config.steps=80"])
        pids = [
            self.start(workdir, process=0, port=port),
            self.start(workdir, other, process=1, port=port),
        ]
        codes = [self.wait(pid) for pid in pids]
        refused = codes == [BAD_INPUT, BAD_INPUT] and not workdir.exists()
        self.count("processes that disagree", refused, f"exit codes {codes}")

    def full_disk(self, workdir):
        workdir.mkdir()
        mount = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={self.draw.randrange(1200, 2400)}k",
            "tmpfs",
            workdir,
        ]
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            print("full disk: left out, as no tmpfs can be mounted here")
            return
        try:
            code = self.wait(self.start(workdir / "run"))
            self.count("full disk", code == BAD_INPUT, f"exit code {code}", 0)
            subprocess.run(["mount", "-o", "remount,size=64m", workdir], check=True)
            self.survive("full disk", workdir / "run")
        finally:
            subprocess.run(["umount", workdir], check=True)

    def go(self):
        once = [self.bit_flip, self.killed_quarantine, self.cut_files, self.second_trainer,
                self.kill_while_compiling,
                self.disagreement, self.full_disk]  # fmt: skip
        number = 0
        while number == 0 or time.monotonic() + 2 * self.run_seconds < self.ends:
            fault = once[number // 2 % len(once)] if number % 2 else self.kills
            fault(self.folder / f"run{number}")
            number += 1
        print(", ".join(f"{kind}: {count}" for kind, count in sorted(self.kinds.items())))
        lost = len(self.lost)
        print(f"{self.faults} faults, {self.faults - lost} survived, {lost} lost")
        return 1 if lost else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="time for everything (default 60)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    code = Chaos(folder, args.seed, args.seconds).go()
    if code == 0:
        shutil.rmtree(folder)
    else:
        print(f"the runs and their log are in {folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
