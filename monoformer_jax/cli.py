"""Shared code of the commands: reading --config, and reporting bad input in one line."""

from __future__ import annotations

import argparse
import ast
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from monoformer_jax.config import Config
from monoformer_jax.errors import BAD_INPUT, InputError, require


def run_command(
    name: str,
    doc: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], int | None],
) -> None:
    """Parses the command line, runs `main` and exits; an InputError prints one line, exit code 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m monoformer_jax.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    add_arguments(parser)
    args, rest = parser.parse_known_args()
    if hasattr(args, "config"):
        args.overrides = [a for a in rest if a.startswith("--config.")]
        rest = [a for a in rest if not a.startswith("--config.")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        sys.exit(main(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def load_config(file: str, overrides: Sequence[str]) -> Config:
    """Builds the config of `--config=FILE[:ARG] --config.group.key=value …`.

    Args:
      file: path of a Python file with get_config(); the text after a colon is passed to it.
      overrides: "--config.group.key=value", where value is a Python literal or else a plain string.

    Raises:
      InputError: the file or a key does not exist, or a value has the wrong type or range.
    """
    path, _, argument = file.partition(":")
    require(Path(path).is_file(), f"--config={path}: no such file")
    get_config = _run_file(Path(path)).get("get_config")
    require(callable(get_config), f"--config={path} has no get_config()")
    values = get_config(*([argument] if argument else [])).to_dict()
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
        except (ValueError, SyntaxError):
            group[last] = text
    from monoformer_jax.models import make_config  # which loads jax: --help does without

    return make_config(values)


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
