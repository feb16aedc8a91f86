"""InputError, which every module raises for bad input, and the exit codes of the commands."""

from __future__ import annotations

import numbers
import re
from typing import Any

# Exit codes; 1 is any unexpected error. Only `train` uses 3 and above.
BAD_INPUT = 2
NON_FINITE = 3  # the loss, the gradient or the parameters are not finite
CRASH_LOOP = 4  # several consecutive starts made no checkpoint
HUNG = 5  # a step took longer than watchdog_seconds
PREEMPTED = 75  # stopped by SIGTERM or Ctrl-C; the state is saved, and the same command resumes
INTERRUPTED = 130  # stopped by Ctrl-C at once, as shells report it


_WORD, _LINE = 200, 390  # characters


class InputError(ValueError):
    """Invalid user input; the message is one sentence that says what to fix.

    Long values in it are shortened: they may be a whole prompt, or come from a hostile file.
    """

    def __init__(self, message: str):
        words = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: shorten(word[0], _WORD), message)
        super().__init__("\n".join(shorten(line, _LINE) for line in words.splitlines()))


class BadExample(InputError):
    """An example that cannot be used. It is skipped, and counted by its reason.

    Reasons: missing_file; picture (cannot be decoded); text (not Unicode); json; empty; schema (of an
    unknown form); size (an image of another size); not_finite (NaN or infinity in an image); unreadable
    (a truncated or damaged record).
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_unicode(text: str, name: str) -> None:
    """Raises InputError for a text with half of a surrogate pair, which has no UTF-8 form.

    JSON with half an emoji has such a text, and a command line in another encoding than the locale's.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not Unicode text: character {error.start + 1} of {text[:40]!a} is half "
            "of a surrogate pair"
        ) from error


def shorten(text: str, most: int) -> str:
    """Cuts the middle out of a text of more than `most` characters: its end often has the reason."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 3]} … {text[-tail:]}"


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """The value as an int; raises InputError unless it is a whole number in this range."""
    require(
        isinstance(value, numbers.Integral) and not isinstance(value, bool),
        f"{name}={shorten(repr(value), 60)} is not a whole number",
    )
    within = value >= least and (most is None or value <= most)
    limits = "must be above 0" if least == 1 else f"must be {least} or more"
    limits = limits if most is None else f"is not between {least} and {most}"
    require(within, f"{name}={shorten(repr(value), 60)} {limits}")
    return int(value)
