"""`python -m monoformer_jax.bench NAME …`: one module for each bench."""

from __future__ import annotations

import importlib
import sys

from monoformer_jax.errors import InputError

BENCHES = {
    "attention": "the interval attention kernels against their peers, or --static counts",
    "training": "the training step: time, useful FLOP/s, memory, waiting for data",
    "sampling": "images and text of a model, with and without the cache of the prompt",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the bench that the first argument names; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    usage = "usage: python -m monoformer_jax.bench NAME [options]   (NAME --help tells more)\n\n"
    usage += "".join(f"  {key:16}{text}\n" for key, text in BENCHES.items())
    if name in ("-h", "--help"):
        print(usage, end="")
        return 0
    if name not in BENCHES:
        print(f"bench {name!r} is none of {', '.join(BENCHES)}\n\n{usage}", end="", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"monoformer_jax.bench.{name}").main(rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
