"""Trains a model, or goes on with one: the same command continues an interrupted run.

  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/wide \\
      --config.model.mlp_dim=512 --config.optimizer.learning_rate=3e-4

Every key of the config can be changed with --config.group.key=value; monoformer_jax/config.py lists
them. The workdir gets config.json, metrics.jsonl (TensorBoard files too, where it is installed) and
checkpoints/. Exit codes: 2 bad input, 3 the loss is no longer a number.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monoformer_jax.cli import NON_FINITE, load_config, run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]",
        help="the experiment, a file in configs/; ARG goes to its get_config, as in digits.py:tiny",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")


def main(args: argparse.Namespace) -> int | None:
    config = load_config(args.config, args.overrides)
    from monoformer_jax.training.loop import NonFiniteLoss, train

    try:
        train(config, args.workdir)
    except NonFiniteLoss as error:
        print(f"stopped: {error}", file=sys.stderr)
        return NON_FINITE


if __name__ == "__main__":
    run_command("train", __doc__, add_arguments, main)
