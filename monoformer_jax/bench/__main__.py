"""`python -m monoformer_jax.bench NAME …`: one module per benchmark."""

from __future__ import annotations

import importlib
import sys

from monoformer_jax.errors import InputError

BENCHES = {
    "attention": "interval attention kernels against other libraries, or --static TPU counts",
    "training": "the training step: time, model FLOP/s, memory, share of time waiting for data",
    "input_pipeline": "reading, packing and decoding by stage, without a model",
    "sampling": "image and text generation, with and without the KV cache of the prompt",
    "ssm": "both forms of the state-space convolution: time here, or compiled for a TPU",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark named by the first argument; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    usage = "usage: python -m monoformer_jax.bench NAME [options]   (options: NAME --help)\n\n"
    usage += "".join(f"  {key:16}{text}\n" for key, text in BENCHES.items())
    if name in ("-h", "--help"):
        print(usage, end="")
        return 0
    if name not in BENCHES:
        print(f"unknown bench {name!r}: choose from {', '.join(BENCHES)}\n\n{usage}", end="",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        return importlib.import_module(f"monoformer_jax.bench.{name}").main(rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
