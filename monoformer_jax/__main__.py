"""`python -m monoformer_jax COMMAND …`, also installed as `monoformer COMMAND …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from monoformer_jax import __version__
from monoformer_jax.cli import RENAMED, call_command, nearest, renamed, report
from monoformer_jax.errors import BAD_INPUT

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "generate text or images from prompts",
    "demo": "serve a web page to chat with a model in text and images",
    "check": "verify the checkpoints and files of a run",
    "evaluate": "compute the metrics of a trained model",
    "prepare_data": "convert pictures, captions and conversations to training records",
    "plan": "estimate whether a run fits a TPU slice, and its speed",
    "convert": "convert weights between Hugging Face folders and workdirs",
    "config": "list the configs of this package, or the keys of one",
    "bench": "measure this machine: attention, training, input, sampling",
}
_MODULES = {"config": "config_keys", "bench": "bench.__main__"}  # of the others: the command's name


def command_module(name: str):
    """The module of a command, which has `add_arguments` and `main`."""
    return importlib.import_module(f"monoformer_jax.{_MODULES.get(name, name)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of this process; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name == "bench":
        return command_module(name).main(rest)
    if name in COMMANDS:
        command = command_module(name)
        return call_command(name, command.__doc__, command.add_arguments, command.main, rest)
    if name == "--version":
        print(_versions())
        return 0
    if name in ("-h", "--help"):
        lines = [f"  {command:<15} {what}" for command, what in COMMANDS.items()]
        print("usage: monoformer COMMAND …; COMMAND --help lists its options\n", *lines, sep="\n")
        return 0
    if name in RENAMED:
        renamed(name)
        return BAD_INPUT
    what = "unknown option" if name.startswith("-") else "unknown command"
    report(f"{what} {name}{nearest(name, [*COMMANDS, '--help', '--version'])} "
           f"(the commands are {', '.join(COMMANDS)})")  # fmt: skip
    return BAD_INPUT


def _versions() -> str:
    """What a bug report needs: this package, and what it stands on."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    return f"monoformer_jax {__version__} ({packages}, Python {sys.version.split()[0]})"


if __name__ == "__main__":
    sys.exit(main())
