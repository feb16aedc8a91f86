"""A workdir has one trainer.

WORKDIR/trainer.json    who trains in it, with a heartbeat; removed when the run ends
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import jax
from etils import epath

from monoformer_jax.errors import BAD_INPUT, InputError, require
from monoformer_jax.files import atomic_write
from monoformer_jax.runtime.checkpoint import require_plain
from monoformer_jax.runtime.processes import allgather_json, run_on_first

_BEAT = 10.0  # seconds between heartbeats
_STALE = 60.0  # seconds without a heartbeat after which the owner counts as dead
_SETTLE = 1.0  # seconds after which one of several that took over sees that another was later


class WorkdirLock:
    """Refuses a second trainer of a workdir, which would destroy the files of the first.

    A lock that a killed trainer left is taken over: on the same machine at once, as the process is seen
    to be dead, otherwise if its heartbeat stands still. Only the file itself is used, so it works on
    shared disks and on storage such as gs://, and clocks need not agree.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir, self._file = workdir, workdir / "trainer.json"
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._owner |= {"process": _identity(os.getpid()), "beats": 0}
        self._created: list[epath.Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> WorkdirLock:
        """Takes the lock.

        Raises:
          InputError: another trainer holds it, the folder cannot be written, or another process of this
            run does not see it.
        """
        token = run_on_first(self._acquire)
        seen = allgather_json(self._sees(token))
        if jax.process_index() == 0:
            self._thread.start()
        if not all(seen):
            self.__exit__()
            raise InputError(
                f"process {seen.index(False)} does not see the files of process 0 in "
                f"{self._workdir}: all processes need the same shared folder"
            )
        return self

    def _acquire(self) -> str:
        require_plain(self._workdir)
        try:
            if "://" not in str(self._workdir):
                folders = (self._workdir, *self._workdir.parents)
                self._created = [folder for folder in folders if not folder.exists()]
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._remove_created()
            raise InputError(
                f"--workdir={self._workdir} cannot be written: {error.strerror or error}"
            ) from error
        return self._owner["token"]

    def _take(self) -> None:
        other, remote = self._read(), "://" in str(self._file)
        if other is not None:
            who = f"process {other.get('pid')} on {other.get('host')}"
            require(
                not self._lives(other, who),
                f"{self._workdir} is in use: {who} trains in it; stop that one or use another "
                "--workdir; nothing was changed",
            )
            print(
                f"WARNING: {who} ended without removing its lock {self._file}; taking it over",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        if other is None and not remote:
            self._create()
        else:
            self._write()
            time.sleep(_SETTLE)
        require(
            self._holds(),
            f"{self._workdir} is in use: another trainer started in it at the same moment",
        )

    def _create(self) -> None:
        try:
            with Path(self._file).open("x", encoding="utf-8") as file:
                file.write(json.dumps(self._owner))
        except FileExistsError:
            pass  # by another trainer, at the same moment

    def _write(self) -> None:
        with atomic_write(self._file) as file:
            file.write_text(json.dumps(self._owner), encoding="utf-8")

    def _read(self) -> dict | None:
        """The lock; {} if it is not readable, None if there is none."""
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # its owner was killed while writing it
            return {}

    def _lives(self, other: dict, who: str) -> bool:
        here, there = self._owner["process"], other.get("process")
        if here and there and here.split()[:2] == there.split()[:2]:  # on the same machine
            return _identity(other["pid"]) == there
        print(
            f"{self._workdir} was in use by {who}; waiting up to {_STALE:g} s for its heartbeat",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        end = time.monotonic() + _STALE
        while time.monotonic() < end:
            time.sleep(_BEAT / 10)
            now = self._read()
            if now != other:
                return now is not None
        return False

    def _sees(self, token: str) -> bool:
        for _ in range(20):  # a network file system may show a new file late
            if (self._read() or {}).get("token") == token:
                return True
            time.sleep(0.5)
        return False

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):  # a full disk: the next save will say so
                self.check()
                self._owner["beats"] += 1
                self._write()

    def check(self) -> None:
        """Ends the process at once if the workdir was removed or another trainer took it over.

        It must be called before saves; the heartbeat calls it too.
        """
        if jax.process_index() == 0 and not self._holds():
            # Even closing files would write to what is no longer this run's.
            print(
                f"error: {self._workdir} was removed while training, or another trainer took it over: "
                "this process ends and writes nothing more",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(BAD_INPUT)

    def _holds(self) -> bool:
        return (self._read() or {}).get("token") == self._owner["token"]

    def __exit__(self, *_) -> None:
        self._ended.set()
        if jax.process_index() != 0:
            return
        self._thread.join(_BEAT)
        if self._holds():
            self._file.unlink(missing_ok=True)
        self._remove_created()

    def _remove_created(self) -> None:
        """Removes the folders that this start created, if they are still empty."""
        for folder in self._created:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _identity(pid: int) -> str | None:
    """Identity of a living process: machine, process namespace, number and start; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # The name of the process, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else f"{boot} {namespace} {pid} {started}"
