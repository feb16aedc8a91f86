"""Verifies a run: every checkpoint against its checksums, config.json, metrics.jsonl and done.json.

  python -m monoformer_jax.check --workdir=runs/digits
  python -m monoformer_jax.check --workdir=runs/digits --json=check.json

It reads only. All files of a checkpoint are compared with the checksums that were written when it was
saved, and every weight must be finite. The exit code is 0 if everything is good, 1 if something is not,
2 for bad input. --json writes {"ok", "checkpoints": [{"step", "ok", "reason"}], "problems"}.
"""

from __future__ import annotations

import argparse

from etils import epath

from monoformer_jax.cli import run_command, storage_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=storage_path, required=True, help="folder of the run")
    parser.add_argument(
        "--json", type=storage_path, metavar="FILE", help="also write the result as JSON"
    )


def main(args: argparse.Namespace) -> int:
    from monoformer_jax.errors import InputError, require
    from monoformer_jax.files import check_output, json_with, write_json
    from monoformer_jax.runtime.checkpoint import Checkpoints
    from monoformer_jax.runtime.workdir import read_config

    workdir = args.workdir
    if args.json:
        check_output(args.json, "--json", json_with("ok", "checkpoints"))
    require(workdir.is_dir(), f"--workdir={workdir} is not a folder")
    problems, checkpoints = [], []
    with Checkpoints(workdir) as saved:
        for step in saved.steps:
            reason = saved.verify(step)
            if reason and not (saved.folder / str(step)).exists():
                continue  # a trainer replaced it by a newer one meanwhile
            checkpoints.append({"step": step, "ok": not reason, "reason": reason})
            print(f"checkpoint {step}: {reason or 'good'}", flush=True)
    if not checkpoints:
        problems.append(f"there is no complete checkpoint in {saved.folder}")
    try:
        read_config(workdir)
    except InputError as error:
        problems.append(str(error))
    newest = max((found["step"] for found in checkpoints), default=0)
    problems += _metrics(workdir / "metrics.jsonl") + _done(workdir, newest)
    for problem in problems:
        print(problem)
    ok = not problems and all(found["ok"] for found in checkpoints)
    print(f"{workdir}: {'good' if ok else 'NOT GOOD'}")
    if args.json:
        result = {"ok": ok, "checkpoints": checkpoints, "problems": problems}
        write_json(args.json, result)
    return 0 if ok else 1


def _metrics(file: epath.Path) -> list[str]:
    """Damaged lines, other than a last one that a killed process cut off, and steps out of order."""
    from monoformer_jax.training.metrics import step_of

    if not file.exists():  # of converted weights
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    steps = [step_of(line) for line in lines]
    if steps and steps[-1] is None and not lines[-1].endswith(b"\n"):
        del steps[-1]
    damaged = [number for number, step in enumerate(steps, 1) if step is None]
    known = [step for step in steps if step is not None]
    found = [f"{file}: line {number} is damaged" for number in damaged]
    if known != sorted(set(known)):
        found.append(f"{file}: its steps do not increase")
    return found


def _done(workdir: epath.Path, newest: int) -> list[str]:
    from monoformer_jax.runtime.workdir import read_done

    file = workdir / "done.json"
    if not file.exists():
        return []
    step = read_done(workdir).get("step")
    if step is None:
        return [f"{file} is damaged"]
    return (
        [] if step == newest else [f"{file} names step {step}, the newest checkpoint is {newest}"]
    )


if __name__ == "__main__":
    run_command("check", __doc__, add_arguments, main)
