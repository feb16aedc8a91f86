"""Trains a model, or goes on with one: the same command continues an interrupted run.

  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/wide \\
      --config.model.mlp_dim=512 --config.optimizer.learning_rate=3e-4

Every key of the config can be changed with --config.group.key=value; monoformer_jax/config.py lists
them. The workdir, a folder or storage such as gs://bucket/run, gets config.json, metrics.jsonl
(TensorBoard files too, where it is installed), checkpoints/, and done.json after the last step.

Several processes train as one when each runs the same command. On TPU pods, Slurm, Open MPI and
Kubernetes they find each other; elsewhere each is told, here two on one machine:

  python -m monoformer_jax.train --coordinator=localhost:12345 --processes=2 --process=0 ... &
  python -m monoformer_jax.train --coordinator=localhost:12345 --processes=2 --process=1 ...

Exit codes:
  0   done
  1   an error that nobody foresaw; WORKDIR/errors/ keeps it
  2   bad input
  3   the loss is no longer a number; the checkpoints before it are good
  4   three starts in a row made no checkpoint; says where to look and how to try again
  5   a step took longer than watchdog_seconds; WORKDIR/errors/ says where every thread stood
  75  told to leave (SIGTERM): saved at the step it was in, the same command goes on
"""

from __future__ import annotations

import argparse
import sys

from etils import epath

from monoformer_jax.cli import load_config, run_command
from monoformer_jax.errors import CRASH_LOOP, HUNG, NON_FINITE, PREEMPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]",
        help="the experiment, a file in configs/; ARG goes to its get_config, as in digits.py:tiny",
    )  # fmt: skip
    parser.add_argument("--workdir", type=epath.Path, required=True, help="folder of the run")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, at a free port")
    parser.add_argument("--processes", type=int, help="how many; 1 keeps to itself on any machine")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from monoformer_jax.runtime.faults import CrashLoop, NonFiniteLoss, Preempted
    from monoformer_jax.runtime.processes import exit_without_barrier, start_processes
    from monoformer_jax.training.loop import train

    codes = {NonFiniteLoss: NON_FINITE, CrashLoop: CRASH_LOOP, Preempted: PREEMPTED}
    start_processes(args.coordinator, args.processes, args.process)
    try:
        train(config, args.workdir, hang_exit_code=HUNG)
    except tuple(codes) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return codes[type(error)]
    except BaseException as error:
        exit_without_barrier(error)
        raise
    return 0


if __name__ == "__main__":
    run_command("train", __doc__, add_arguments, main)
