"""`python -m monoformer_jax.bench NAME …`: one module per benchmark, and their command lines.

The arguments stand here, and not in the modules, so that --help does without importing jax.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from monoformer_jax.cli import (
    call_command,
    finite,
    integer,
    local_path,
    nearest,
    report,
    storage_path,
)
from monoformer_jax.errors import BAD_INPUT
from monoformer_jax.files import check_output, json_with, write_json

BENCHES = {
    "attention": "interval attention kernels against other libraries, or --static TPU counts",
    "training": "the training step: time, model FLOP/s, memory, share of time waiting for data",
    "input_pipeline": "reading, packing and decoding by stage, without a model",
    "sampling": "image and text generation, with and without the KV cache of the prompt",
    "ssm": "both forms of the state-space convolution: time here, or compiled for a TPU",
}
# Keys of the JSON that each writes, and may replace.
_KEYS = {
    "attention": ["rows"],
    "training": ["step_ms"],
    "input_pipeline": ["documents_per_s"],
    "sampling": ["uncached_seconds"],
    "ssm": ["rows"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark named by the first argument; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {key:16}{text}" for key, text in BENCHES.items()]
        print("usage: monoformer bench NAME …; NAME --help lists its options\n", *lines, sep="\n")
        return 0
    if name not in BENCHES:
        report(f"unknown bench {name!r}: choose from {', '.join(BENCHES)}{nearest(name, BENCHES)}")
        return BAD_INPUT
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source))
    return call_command(
        f"bench {name}", doc, bench_arguments(name), lambda args: _run(name, args), rest
    )


def _run(name: str, args: argparse.Namespace) -> None:
    if args.json:
        check_output(args.json, "--json", json_with(*_KEYS[name]))
    found = importlib.import_module(f"monoformer_jax.bench.{name}").run(args)
    if args.json:
        write_json(args.json, found)


def bench_arguments(name: str) -> Callable[[argparse.ArgumentParser], None]:
    """The function that adds the arguments of a benchmark to a parser."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--json", type=storage_path, metavar="FILE", help="write the results to this file"
        )
        _ARGUMENTS[name](parser.add_argument)

    return add_arguments


def _attention(add: Callable) -> None:
    add("--mixes", nargs="+", help="row mixes to time; default by platform")
    add("--heads", help="query heads x KV heads x head dim, e.g. 32x4x64; default by platform")
    add("--tokens", type=integer(1), help="tokens per call; default by platform")
    add("--repeats", type=integer(1), default=20, help="timed calls (default 20)")
    add("--static", action="store_true", help="count TPU bundles without timing")
    add("--chips", nargs="+", default=["v5e", "v6e"], help="for --static")
    add("--head-dims", nargs="+", type=int, default=[64, 128], choices=(64, 128, 256),
        help="for --static")  # fmt: skip


def _training(add: Callable) -> None:
    add("--config", metavar="NAME|FILE[:ARG]",
        help="config and its data; default: the model above")  # fmt: skip
    add("--steps", type=integer(1), default=10, help="timed steps (default 10)")
    _compare(add)


def _sampling(add: Callable) -> None:
    add("--prompt_tokens", type=integer(3), default=64,
        help="prompt length, <s> and <|im_start|> included (default 64)")  # fmt: skip
    add("--images", type=integer(1), default=8, help="images per batch (default 8)")
    add("--steps", type=integer(1, 1000), default=20, help="solver steps (default 20)")
    add("--solver", default="euler", help="default euler; heun runs the model twice per step")
    add("--repeats", type=integer(1), default=3,
        help="timed runs; the median is reported (default 3)")  # fmt: skip
    add("--workdir", type=storage_path, help="folder of a trained run to measure")
    add("--sweep", action="store_true", help="also time other batch sizes, steps and prompts")
    _compare(add)


def _input_pipeline(add: Callable) -> None:
    add("--config", metavar="NAME|FILE[:ARG]", help="config and its data; default: see above")
    add("--host_rows", type=integer(1), default=16,
        help="rows of the batch that a host makes (default 16)")  # fmt: skip
    add("--workers", type=integer(0), help="worker processes (default: one per core)")
    add("--seconds", type=finite, default=5.0, help="time of each measurement (default 5)")
    add("--documents", type=integer(1), default=100_000,
        help="for the memory slope (default 100000)")  # fmt: skip


def _ssm(add: Callable) -> None:
    add("--lengths", default="64,256,1024,4096", help="of the sequences")
    add("--dim", type=integer(1), default=128, help="channels (default 128)")
    add("--batch", type=integer(1), default=8, help="sequences (default 8)")
    add("--state_size", type=integer(1), default=64)
    add("--chunk", type=integer(1), default=128)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--repeats", type=integer(1), default=5, help="timed rounds (default 5)")
    add("--chip", metavar="TOPOLOGY", help="compile for this chip, as v5e:2x2")


def _compare(add: Callable) -> None:
    add("--compare", type=local_path, metavar="DIR",
        help="timings of other implementations, see above")  # fmt: skip


_ARGUMENTS = {
    "attention": _attention,
    "training": _training,
    "input_pipeline": _input_pipeline,
    "sampling": _sampling,
    "ssm": _ssm,
}


if __name__ == "__main__":
    sys.exit(main())
