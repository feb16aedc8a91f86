"""Shared code of the commands: reading the command line and --config, and errors of one sentence."""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import inspect
import io
import math
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath

from monoformer_jax.config import Config
from monoformer_jax.errors import BAD_INPUT, InputError, require, shorten
from monoformer_jax.files import expand
from monoformer_jax.planning import NO_TPU

_LINES = 6  # of an error message on stderr; `InputError` limits their length
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL)

RENAMED = {"encode_latents": "prepare_data"}  # commands that had another name

# Where the configs are that `--config=NAME` means: in an installed package, and in a checkout.
_CONFIGS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence and a pointer to --help."""

    def error(self, message: str):
        report(f"{message} (see {self.prog} --help)")
        sys.exit(BAD_INPUT)


def make_parser(name: str, doc: str | None, add_arguments: Callable) -> Parser:
    """The parser of a command, which calls itself as the user called it."""
    installed = Path(sys.argv[0]).stem == "monoformer"
    parser = Parser(
        prog=f"{'monoformer' if installed else 'python -m monoformer_jax'} {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    add_arguments(parser)
    return parser


def call_command(
    name: str,
    doc: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the command line and runs `main`; returns the exit code.

    Bad input, and files that cannot be read or written, print one sentence; the exit code is 2.
    """
    _quiet_libtpu()
    parser = make_parser(name, doc, add_arguments)
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "config"):
        args.overrides = [a for a in rest if a.startswith("--config.")]
        for override in args.overrides:
            if "=" not in override:
                parser.error(f"write {override}=VALUE, with = and without spaces")
        rest = [a for a in rest if not a.startswith("--config.")]
    if rest:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {rest[0]}{nearest(rest[0].partition('=')[0], options)}")
    try:
        return main(args) or 0
    except InputError as error:
        report(error)
    except RuntimeError as error:
        from monoformer_jax.runtime.compiler import advice

        if (text := advice(error)) is None:
            raise
        report(text)
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        report(f"{error.filename}: {error.strerror}")
    except OSError as error:
        if error.errno not in _FULL:
            raise
        report(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    return BAD_INPUT


def _quiet_libtpu() -> None:
    """Keeps libtpu, which `plan` needs, from five alarming lines on a machine without a TPU."""
    devices = Path("/sys/bus/pci/devices").glob("*/vendor")
    if not any(
        device.read_text(encoding="utf-8").strip() == "0x1ae0" for device in devices
    ):  # Google's
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def run_command(name, doc, add_arguments, main) -> None:
    """`call_command` with the command line of this process, then exits."""
    sys.exit(call_command(name, doc, add_arguments, main))


def storage_path(text: str) -> epath.Path:
    """A flag's value: a path on this machine or on storage such as gs://, with ~ expanded."""
    try:
        return expand(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def model_path(text: str) -> epath.Path:
    """A flag's value: as `storage_path`, or the name of a model that comes with the package."""
    from monoformer_jax.runtime.workdir import model_folder

    storage_path(text)
    return model_folder(text)


def local_path(text: str) -> Path:
    """A flag's value: a path on this machine, with ~ expanded."""
    path = storage_path(text)
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine: copy it first")
    return Path(path)


def checkpoint_step(text: str) -> int | str:
    """A flag's type: the step of a checkpoint, or "best"."""
    return text if text == "best" else integer(0)(text)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A flag's type: a whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{shorten(text, 60)!r} is not a whole number"
            ) from None
        if value < least or (most is not None and value > most):
            limits = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{shorten(text, 60)} must be {limits}")
        return value

    return parse


SEED = integer(0, 2**32 - 1)


def finite(text: str) -> float:
    """A flag's value: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not a finite number")
    return value


def report(error: object) -> None:
    """Prints an error on stderr, in at most 6 lines of at most 400 characters."""
    lines = f"error: {InputError(str(error))}".splitlines()
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"… and {len(lines) - _LINES + 1} more lines"]
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        lines[0] = lines[0].replace("error:", "\033[31merror:\033[0m", 1)
    print("\n".join(lines), file=sys.stderr)


def renamed(command: str) -> None:
    """Prints the new name of a command that had another one."""
    report(f"{command} is now {RENAMED[command]}: the images of records are pixels by default, and "
           "latents with --codec=sd_vae --vae=DIR")  # fmt: skip


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?" with the name that resembles `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def load_config(file: str, overrides: Sequence[str]) -> Config:
    """Builds the config of `--config=FILE[:ARG] --config.group.key=value …`.

    Args:
      file: path of a Python file with get_config(), or the name of a config of this package, such as
        "digits"; the text after a colon is passed to get_config.
      overrides: "--config.group.key=value", where value is a Python literal or else a plain string.

    Raises:
      InputError: the file or a key does not exist, or a value has the wrong type or range.
    """
    values = _get_config(file)
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        require(equals == "=", f"{override}: write it as --config.{key}=VALUE")
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
            require(isinstance(group, dict), f"config key {key}: {name} is a value, not a group")
        try:
            group[last] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            group[last] = text
    from monoformer_jax.models import make_config  # which loads jax: --help does without

    return make_config(values)


def _get_config(file: str) -> dict:
    """The nested values that get_config of FILE[:ARG] returns."""
    import ml_collections

    name, _, argument = file.partition(":")
    path, arguments = find_config(name), [argument] if argument else []
    try:
        get_config = _run_file(path).get("get_config")
        if not callable(get_config):
            raise InputError(f"--config={name} has no get_config()")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            require(
                False,
                f"--config={file}: get_config() of {path.name} takes other arguments ({error})",
            )
        config = get_config(*arguments)
    except InputError:
        raise
    except Exception as error:  # the file is the user's own program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]  # fmt: skip
        line = getattr(error, "lineno", None) or (lines or [1])[-1]
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    require(
        isinstance(config, ml_collections.ConfigDict),
        f"--config={name}: get_config() returns {type(config).__name__}, not the ConfigDict that "
        "base_config() makes",
    )
    return config.to_dict()


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs of this package."""
    files = [file for folder in _CONFIGS for file in sorted(folder.glob("*.py"))]
    return {file.stem: file for file in reversed(files) if file.stem != "common"}


def find_config(name: str) -> Path:
    """The file of --config=NAME: a path, or the name of a config of this package.

    Raises:
      InputError: there is neither.
    """
    path, shipped = Path(name).expanduser(), shipped_configs()
    if path.is_file():
        return path
    require(
        name in shipped,
        f"--config={name}: no such file; the configs of the package are "
        f"{', '.join(sorted(shipped))}{nearest(path.stem, list(shipped))}",
    )
    return shipped[name]


def _run_file(path: Path) -> dict:
    """Runs a Python file and returns its globals; like a script, it can import files beside it."""
    folder, loaded = str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.remove(folder)
        # A config in another folder may import a different module of the same name.
        for name in set(sys.modules) - loaded:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
