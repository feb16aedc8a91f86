"""Trains a model; the same command resumes an interrupted run.

  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/wide \\
      --config.model.mlp_dim=512 --config.optimizer.learning_rate=3e-4

  python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/digits \\
      --inspect=data.html                          shows what would be trained, and trains nothing

Every config key can be overridden with --config.group.key=value; monoformer_jax/config.py lists
them. The workdir, a folder or storage such as gs://bucket/run, receives config.json, metrics.jsonl,
TensorBoard files if it is installed, checkpoints/, and done.json after the last step; with
validation.every above 0 also samples/ and report.html, which shows how the run goes.

For a multi-process run, start the same command in every process. On TPU pods, Slurm, Open MPI and
Kubernetes jax detects the processes; elsewhere pass them, here for two on one machine:

  python -m monoformer_jax.train --coordinator=localhost:12345 --processes=2 --process=0 ... &
  python -m monoformer_jax.train --coordinator=localhost:12345 --processes=2 --process=1 ...

Exit codes:
  0   done
  1   unexpected error, recorded in WORKDIR/errors/
  2   bad input; or a workdir that is in use, full, read-only or gone
  3   the loss, the gradient or the parameters are not finite; earlier checkpoints are valid
  4   three consecutive starts made no checkpoint; the message says how to retry
  5   a step took longer than watchdog_seconds; WORKDIR/errors/ has the stack of every thread
  75  preempted (SIGTERM) or Ctrl-C: saved after the current step, the same command resumes
  130 Ctrl-C a second time, or before the first step: the same command resumes the last checkpoint
"""

from __future__ import annotations

import argparse
import functools
import sys

from etils import epath

from monoformer_jax.cli import integer, load_config, run_command, storage_path
from monoformer_jax.errors import (
    CRASH_LOOP,
    HUNG,
    INTERRUPTED,
    NON_FINITE,
    PREEMPTED,
    require,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]",
        help="config: a file, or a name that the command config lists; ARG is for its get_config, "
        "as in digits:tiny",
    )  # fmt: skip
    parser.add_argument("--workdir", type=storage_path, required=True, help="folder of the run")
    parser.add_argument(
        "--inspect", type=storage_path, metavar="FILE.html",
        help="write a page about the data, its sources and first packed rows, and train nothing",
    )  # fmt: skip
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, with a free port")
    parser.add_argument(
        "--processes", type=integer(1), help="their number; 1 alone skips jax's detection"
    )
    parser.add_argument("--process", type=integer(0), help="index of this process, from 0")


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if args.inspect is not None:
        _inspect(config, args.workdir, args.inspect)
        return 0
    from monoformer_jax.runtime.faults import exit_soon
    from monoformer_jax.runtime.processes import start_processes

    start_processes(args.coordinator, args.processes, args.process)
    code = _train(config, args.workdir)
    exit_soon(code)
    return code


def _inspect(config, workdir: epath.Path, page: epath.Path) -> None:
    from monoformer_jax.data.tokenizer import open_tokenizer
    from monoformer_jax.evaluation.html import is_page_of
    from monoformer_jax.evaluation.inspection import COMMAND, write_inspection
    from monoformer_jax.files import check_output
    from monoformer_jax.sampling.sampler import Sampler

    require(page.suffix == ".html", f"--inspect={page} must end in .html")
    check_output(page, "--inspect", functools.partial(is_page_of, command=COMMAND))
    base = epath.Path(config.init_from) if config.init_from else None
    tokenizer = open_tokenizer(config.data, workdir, config.layout.vocab_size, base)
    write_inspection(page, Sampler(config, {}, tokenizer))
    print(f"the data of {config.name} is shown in {page}; nothing was trained")


def _train(config, workdir: epath.Path) -> int:
    from monoformer_jax.evaluation.validation import Validation
    from monoformer_jax.runtime.faults import CrashLoop, NonFiniteLoss, Preempted, storage_error
    from monoformer_jax.runtime.processes import exit_without_barrier
    from monoformer_jax.training.loop import train

    codes = {NonFiniteLoss: NON_FINITE, CrashLoop: CRASH_LOOP, Preempted: PREEMPTED}
    try:
        train(config, workdir, hang_exit_code=HUNG, open_validation=Validation)
    except tuple(codes) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return codes[type(error)]
    except KeyboardInterrupt as error:
        exit_without_barrier(error)
        print("stopped by Ctrl-C; the same command resumes the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        explained = storage_error(error, workdir) or error
        exit_without_barrier(explained)
        raise explained from error
    return 0


if __name__ == "__main__":
    run_command("train", __doc__, add_arguments, main)
