"""Multi-process runs: initialisation, and values that the processes exchange between steps."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from monoformer_jax.errors import BAD_INPUT, InputError, require

_BUFFER = 1024  # bytes; sizes are rounded up to multiples of it, to avoid recompilation
_GRACE = 5.0  # seconds that process 0 waits before it exits


def start_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Initialises jax.distributed; must be called before jax uses a device.

    On TPU pods, Slurm, Open MPI and Kubernetes jax detects the processes; pass none of the arguments.
    count=1 alone skips the detection and runs a single process.

    Args:
      coordinator: "host:port" of process 0, with a free port.
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      InputError: the three arguments are inconsistent, or this process was started twice.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if count == 1 and given == [False, True, False]:
        return
    require(
        all(given) or not any(given),
        "--coordinator, --processes and --process must be given together (or --processes=1 alone)",
    )
    if not any(given):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        return  # no cluster was detected: a single-process run
    host, _, port = coordinator.rpartition(":")
    require(host != "" and port.isdigit(), f"--coordinator={coordinator} is not HOST:PORT")
    require(0 <= index < count, f"--process={index} is not between 0 and --processes={count} - 1")
    _require_single(coordinator, index)
    jax.distributed.initialize(coordinator, count, index)


def _require_single(coordinator: str, index: int) -> None:
    """Raises InputError if this process runs already here; it would end the run of the first."""
    global _name  # held, and released by the system at the end of the process
    _name = socket.socket(socket.AF_UNIX)
    try:
        _name.bind(f"\0monoformer_jax process {index} of {coordinator}")  # no file: only a name
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        require(not taken, f"--process={index} of --coordinator={coordinator} was started twice")


_name: socket.socket | None = None


def start_share(coordinator: str | None, count: int | None, index: int | None) -> tuple[int, int]:
    """Index and number of this process among those that divide files or images among them.

    With `count` and `index` but no coordinator, the processes are independent of each other; else see
    `start_processes`.
    """
    if coordinator is not None or index is None:
        start_processes(coordinator, count, index)
        return jax.process_index(), jax.process_count()
    require(count is not None, "--process needs --processes")
    require(0 <= index < count, f"--process={index} is not between 0 and --processes={count} - 1")
    return index, count


def allgather_json(value: Any) -> list:
    """Gathers a JSON value from every process, in process order; all must call it together."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    buffer = np.zeros(-(-int(max(sizes)) // _BUFFER) * _BUFFER, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def require_agreement(values: Mapping[str, Any]) -> None:
    """Compares what every process is about to do; all must call it together.

    Args:
      values: JSON values by name, such as the keys of the config; the code is added.

    Raises:
      InputError: on all processes, if one has another value than process 0.
    """
    every = allgather_json({**values, "the code of monoformer_jax": _code()})
    first = every[0]
    for index, other in enumerate(every):
        for key in sorted(first.keys() | other.keys()):
            require(
                first.get(key) == other.get(key),
                f"process {index} has {key}={other.get(key)!r}, but process 0 has "
                f"{first.get(key)!r}: start the same command, code and data on all; nothing was done",
            )


def _code() -> str:
    """Hash of the source files of this library, and the version of jax."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return f"{digest.hexdigest()[:16]} with jax {jax.__version__}"


def run_on_first(action: Callable[[], Any]) -> Any:
    """Runs `action` on process 0 and returns its JSON result, or raises its InputError, on all."""
    answer, refusal = None, None
    if jax.process_index() == 0:
        try:
            answer = action()
        except InputError as error:
            refusal = str(error)
    answer, refusal = allgather_json([answer, refusal])[0]
    if refusal is not None:
        raise InputError(refusal)
    return answer


def exit_without_barrier(error: BaseException) -> None:
    """Exits at once: a normal exit of a multi-process run waits at a barrier for the other processes.

    Returns without effect in a single-process run.
    """
    if jax.process_count() == 1:
        return
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # hosts the coordinator: the others must print their errors first
        time.sleep(_GRACE)
    os._exit(BAD_INPUT if isinstance(error, InputError) else 1)
