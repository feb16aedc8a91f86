"""What may end a run before its last step: a notice to leave, a crash that repeats, a hang.

WORKDIR/starts.json         how many starts in a row ended without a new checkpoint
WORKDIR/errors/             the last error of each process, or where it hung
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback

import jax
from etils import epath
from jax.experimental import multihost_utils

from monoformer_jax.runtime.processes import run_on_first

_MOST_STARTS = 3
_COMPILING = 3600.0  # seconds that the first step may take on top
_NOTING = 30.0  # seconds to write down a hang


class NonFiniteLoss(RuntimeError):
    """The loss, the gradient or the parameters became NaN or infinite."""


class Preempted(RuntimeError):
    """The machine is taken away; everything up to this step is saved."""


class CrashLoop(RuntimeError):
    """Several starts in a row came no further."""


class Preemption:
    """Listens for SIGTERM, with which schedulers and clouds say that they take the machine away.

    Of several processes one is told first; jax passes it on, and all stop after the same step. A second
    SIGTERM ends a process at once, of several from that step on. Only the main thread can listen, so a
    single process that trains in another thread does not.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._listens = threading.current_thread() is threading.main_thread()
        self._told = False

    def __enter__(self) -> Preemption:
        if self._listens and not self._several:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, *_) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to save and leave after this step; to be asked once after every step."""
        if not self._several:
            return self._told
        if not self._told and multihost_utils.reached_preemption_sync_point(step):
            self._told = True
            if self._listens:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._told

    def __exit__(self, *_) -> None:
        if self._listens and not self._several:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


class CrashLoopGuard:
    """Counts starts that made no checkpoint, and keeps the error of the last one.

    A start that ends in order does not count, nor does one that was told to leave, or that a person
    interrupted.
    """

    def __init__(self, workdir: epath.Path, checkpoint: int | None):
        """Args:
        workdir: folder of the run.
        checkpoint: the newest step; another one than at the start before is progress.

        Raises:
          CrashLoop: the third start in a row stood here and came no further.
        """
        self._file, self._errors = workdir / "starts.json", workdir / "errors"
        self._checkpoint = checkpoint
        self._before = run_on_first(self._read)
        if self._before >= _MOST_STARTS:
            where = "the beginning" if checkpoint is None else f"checkpoint {checkpoint}"
            raise CrashLoop(
                f"{self._before} starts in a row came no further than {where}; the last errors are in "
                f"{self._errors} (no file there: killed from outside, perhaps for want of memory). "
                f"When the cause is mended, remove {self._file} and start again"
            )

    def _read(self) -> int:
        if not self._file.exists():
            return 0
        try:
            values = json.loads(self._file.read_text())
            return values["starts"] if values["checkpoint"] == self._checkpoint else 0
        except (json.JSONDecodeError, KeyError):  # the kill came while it was written
            return 0

    def _write(self, starts: int) -> None:
        if jax.process_index() == 0:
            text = json.dumps({"starts": starts, "checkpoint": self._checkpoint})
            self._file.write_text(text + "\n")

    def __enter__(self) -> CrashLoopGuard:
        self._write(self._before + 1)
        return self

    def __exit__(self, kind, error, _) -> None:
        if error is None:
            if jax.process_index() == 0:
                self._file.unlink(missing_ok=True)
        elif isinstance(error, Preempted | KeyboardInterrupt):
            self._write(self._before)
        else:
            write_error(self._errors, "error", "".join(traceback.format_exception(error)))


def write_error(folder: epath.Path, kind: str, text: str) -> epath.Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}_of_process_{jax.process_index()}.txt"
    file.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{text}")
    return file


class Watchdog:
    """Ends the process when a step takes too long, after writing down where every thread stands.

    A thread watches. It cannot act while a C extension holds the GIL: then `faulthandler`, which needs
    no lock, prints the stacks a minute later and ends the process with exit code 1.
    """

    def __init__(self, seconds: float, workdir: epath.Path, exit_code: int):
        """Args:
        seconds: a step may take; 0 never ends anything.
        workdir: gets errors/hang_of_process_N.txt.
        exit_code: of the process.
        """
        self._seconds, self._errors, self._exit_code = seconds, workdir / "errors", exit_code
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """A step is done."""
        self._expect_within(self._seconds)

    def _expect_within(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        if self._seconds:
            later = seconds + self._seconds / 4 + 2 * _NOTING  # the thread has had its time by then
            faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / 4):  # the first beat moves the deadline forward
            if time.monotonic() >= self._deadline:
                self._end()
                return

    def _end(self) -> None:
        with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a real file
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        said = f"no step was done within watchdog_seconds={self._seconds:g}"
        print(f"stopped: {said}; every thread stands here:\n{stacks}", file=sys.stderr, flush=True)
        # The storage may be what hangs: it gets a moment, and the exit comes in any case.
        note = threading.Thread(
            target=write_error, args=(self._errors, "hang", f"{said}\n{stacks}"), daemon=True
        )
        note.start()
        note.join(_NOTING)
        os._exit(self._exit_code)

    def __enter__(self) -> Watchdog:
        self._expect_within(self._seconds + _COMPILING)
        if self._seconds:
            self._thread.start()
        return self

    def stop(self) -> None:
        """Nothing is expected any more."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def __exit__(self, *_) -> None:
        self.stop()
