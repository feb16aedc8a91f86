"""What can end a run before its last step: a preemption, Ctrl-C, a crash loop or a hang.

WORKDIR/starts.json         number of consecutive starts that made no new checkpoint
WORKDIR/errors/             the last error of each process, or its stacks at a hang
"""

from __future__ import annotations

import contextlib
import errno
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

from monoformer_jax.errors import InputError
from monoformer_jax.files import atomic_write
from monoformer_jax.runtime.processes import run_on_first

_MAX_STARTS = 3
_COMPILE_SECONDS = 3600.0  # added to the time limit of the first step
_WRITE_SECONDS = 30.0  # time limit for writing the stacks of a hang to storage
_EXIT_SECONDS = 60.0  # time limit of a process that has finished its work
# Errors of storage without a path, which orbax passes on as texts.
_NO_SPACE = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


class NonFiniteLoss(RuntimeError):
    """The loss, the gradient or the parameters became NaN or infinite."""


class Preempted(RuntimeError):
    """The process received SIGTERM or SIGINT (Ctrl-C) and has saved the state of this step."""


class CrashLoop(RuntimeError):
    """Several consecutive starts made no new checkpoint."""


class Preemption:
    """Handles SIGTERM, which schedulers and clouds send before they preempt a machine, and Ctrl-C.

    With several processes, jax forwards the signal of one to all, and all stop after the same step. A
    second signal ends the process at once (a second SIGTERM of several processes, only after that
    step). A process that trains outside the main thread handles neither: Python forbids it.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        # With several processes, jax has its own handler of SIGTERM.
        self._signals = [signal.SIGINT] + ([] if self._several else [signal.SIGTERM])
        self._received = False

    def __enter__(self) -> Preemption:
        if self._in_main_thread:
            self._before = {s: signal.signal(s, self._on_signal) for s in self._signals}
        return self

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT:
            print("Ctrl-C: saving after this step; a second one ends at once", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax forwards
        else:
            self._received = True

    def reached(self, step: int) -> bool:
        """Whether to save and exit after this step; must be called once after every step."""
        if not self._several:
            return self._received
        if not self._received and multihost_utils.reached_preemption_sync_point(step):
            self._received = True
            if self._in_main_thread:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._received

    def __exit__(self, *_) -> None:
        if self._in_main_thread:
            for number, before in self._before.items():
                signal.signal(number, before or signal.SIG_DFL)


class CrashLoopGuard:
    """Counts consecutive starts that made no checkpoint, and records the error of the last one.

    Starts that end normally, by preemption, by KeyboardInterrupt or by bad input do not count.
    """

    def __init__(self, workdir: epath.Path, checkpoint: int | None):
        """Args:
        workdir: folder of the run.
        checkpoint: step of the newest checkpoint; if it differs from the previous start's, the
          count restarts at 0.

        Raises:
          CrashLoop: the previous three starts began at this checkpoint and made no other.
        """
        self._file, self._errors = workdir / "starts.json", workdir / "errors"
        self._checkpoint = checkpoint
        self._before = run_on_first(self._read)
        if self._before >= _MAX_STARTS:
            where = "step 0" if checkpoint is None else f"checkpoint {checkpoint}"
            raise CrashLoop(
                f"{self._before} consecutive starts made no new checkpoint after {where}; the last "
                f"errors are in {self._errors} (without a file there, the process was killed, possibly "
                f"out of memory); fix the cause, remove {self._file} and start again"
            )

    def _read(self) -> int:
        try:
            values = json.loads(self._file.read_bytes())
            return int(values["starts"]) if values["checkpoint"] == self._checkpoint else 0
        except (FileNotFoundError, ValueError, TypeError, LookupError):  # or it is damaged
            return 0

    def _write(self, starts: int) -> None:
        if jax.process_index() == 0:
            text = json.dumps({"starts": starts, "checkpoint": self._checkpoint})
            with atomic_write(self._file) as file:
                file.write_text(text + "\n", encoding="utf-8")

    def __enter__(self) -> CrashLoopGuard:
        self._write(self._before + 1)
        return self

    def __exit__(self, kind, error, _) -> None:
        with contextlib.suppress(OSError):  # the disk may be full: then `error` says so
            bad_input = isinstance(error, InputError)
            if isinstance(error, Preempted | KeyboardInterrupt) or (bad_input and self._before):
                self._write(self._before)
            elif error is None or bad_input:
                if jax.process_index() == 0:
                    self._file.unlink(missing_ok=True)
            else:
                write_error(self._errors, "error", "".join(traceback.format_exception(error)))


def write_error(folder: epath.Path, kind: str, text: str) -> epath.Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}_of_process_{jax.process_index()}.txt"
    file.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{text}", encoding="utf-8")
    return file


class Watchdog:
    """Ends the process when a step, or the end of a run, takes too long, and dumps all stacks.

    The check runs in a thread, which cannot act while a C extension holds the GIL: then `faulthandler`,
    which needs no lock, prints the stacks a minute later and ends the process with exit code 1.
    """

    def __init__(self, seconds: float, workdir: epath.Path, exit_code: int):
        """Args:
        seconds: time limit of a step; 0 disables the watchdog.
        workdir: folder of the run; the stacks are written to errors/hang_of_process_N.txt.
        exit_code: exit code of the process after a hang.
        """
        self._seconds, self._errors, self._exit_code = seconds, workdir / "errors", exit_code
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Restarts the time limit; must be called after every step."""
        self._expect_within(self._seconds)

    def _expect_within(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        if self._seconds:
            later = seconds + self._seconds / 4 + 2 * _WRITE_SECONDS  # after the thread's own exit
            faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        # Polls, because the first beat makes the deadline earlier.
        while not self._ended.wait(self._seconds / 4):
            if time.monotonic() >= self._deadline:
                self._end()
                return

    def _end(self) -> None:
        with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a real file
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        reason = f"no step completed within watchdog_seconds={self._seconds:g}"
        print(f"stopped: {reason}; stacks of all threads:\n{stacks}", file=sys.stderr, flush=True)
        # The storage may be what hangs, so the write has a time limit.
        writer = threading.Thread(
            target=write_error, args=(self._errors, "hang", f"{reason}\n{stacks}"), daemon=True
        )
        writer.start()
        writer.join(_WRITE_SECONDS)
        os._exit(self._exit_code)

    def __enter__(self) -> Watchdog:
        self._expect_within(self._seconds + _COMPILE_SECONDS)
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()


def storage_error(error: BaseException | None, workdir: epath.PathLike) -> InputError | None:
    """The sentence for a workdir that is full, read-only or gone, if that is what caused `error`."""
    while error is not None:
        text = str(error)
        reason = next((reason for reason in _NO_SPACE if reason in text), "")
        if not reason and isinstance(error, OSError) and str(workdir) in text:
            reason = error.strerror or type(error).__name__
        if reason:
            return InputError(
                f"{workdir} cannot be written or read: {reason}; the checkpoints in it stay valid, and "
                "the same command resumes once this is repaired"
            )
        error = error.__cause__ or error.__context__
    return None


def exit_soon(code: int) -> None:
    """Ends the process with this code if it does not end by itself once its main thread has."""

    def end():
        threading.main_thread().join()
        time.sleep(_EXIT_SECONDS)
        print(f"stopped: the process did not exit by itself in {_EXIT_SECONDS:g} s",
              file=sys.__stderr__, flush=True)  # fmt: skip
        os._exit(code)

    threading.Thread(target=end, name="exit", daemon=True).start()
