"""Several processes as one run: how they find each other, and what they agree on between steps."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from monoformer_jax.errors import BAD_INPUT, InputError, require

_BUFFER = 1024  # bytes; sizes are rounded up to it, so that the exchange compiles rarely
_GRACE = 5.0  # seconds


def start_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of the run; to be called before jax touches a device.

    On TPU pods, Slurm, Open MPI and Kubernetes jax finds them by itself. On machines that only look
    like one of those, count=1 keeps a process to itself.

    Args:
      coordinator: "host:port" of process 0, at a port that is free there.
      count: how many processes there are.
      index: which of them this is, from 0.

    Raises:
      InputError: the three do not fit together.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if count == 1 and given == [False, True, False]:
        return
    require(
        all(given) or not any(given),
        "--coordinator, --processes and --process go together (or --processes=1 alone)",
    )
    if not any(given):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        return  # no cluster was found: this process is the whole run
    host, _, port = coordinator.rpartition(":")
    require(host != "" and port.isdigit(), f"--coordinator={coordinator} is not HOST:PORT")
    require(0 <= index < count, f"--process={index} is not between 0 and --processes={count} - 1")
    jax.distributed.initialize(coordinator, count, index)


def allgather_json(value: Any) -> list:
    """The JSON value of every process, in their order; all of them call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    buffer = np.zeros(-(-int(max(sizes)) // _BUFFER) * _BUFFER, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def run_on_first(action: Callable[[], Any]) -> Any:
    """Does `action` on process 0 alone and gives its JSON result, or its InputError, to all."""
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
    """Ends this process of several at once: in an orderly exit each would wait for all the others.

    The only process of a run returns.
    """
    if jax.process_count() == 1:
        return
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # with it goes what holds the others together: they speak first
        time.sleep(_GRACE)
    os._exit(BAD_INPUT if isinstance(error, InputError) else 1)
