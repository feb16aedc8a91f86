"""What every module refuses bad input with, and how the commands end."""

from __future__ import annotations

# Exit codes. 1 is an unexpected error; all but 0 and 2 belong to `train`.
BAD_INPUT = 2
NON_FINITE = 3  # the loss is no longer a number
CRASH_LOOP = 4  # several starts in a row made no checkpoint
HUNG = 5  # a step took longer than watchdog_seconds
PREEMPTED = 75  # stopped by SIGTERM; the state is saved, and the same command resumes


class InputError(ValueError):
    """Something that the user gave is wrong; the message is a sentence they can act on."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
