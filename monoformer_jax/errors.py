"""InputError, which every module raises for bad input, and the exit codes of the commands."""

from __future__ import annotations

# Exit codes; 1 is any unexpected error. Only `train` uses 3 and above.
BAD_INPUT = 2
NON_FINITE = 3  # the loss, the gradient or the parameters are not finite
CRASH_LOOP = 4  # several consecutive starts made no checkpoint
HUNG = 5  # a step took longer than watchdog_seconds
PREEMPTED = 75  # stopped by SIGTERM; the state is saved, and the same command resumes


class InputError(ValueError):
    """Invalid user input; the message is one sentence that says what to fix."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
