"""The folder of a run, or storage such as gs://bucket/run: its config and its completion marker.

WORKDIR/config.json     from which every command rebuilds the model
WORKDIR/done.json       {"step", "name", "train_seconds"}, written when the last step is saved

The modules checkpoint, metrics and faults list their own files.
"""

from __future__ import annotations

import dataclasses
import json

import jax
from etils import epath

from monoformer_jax.config import Config
from monoformer_jax.errors import require
from monoformer_jax.files import atomic_write
from monoformer_jax.models import make_config

# Config keys that may change when a run is resumed; `claim_workdir` rejects any other change.
_MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "max_to_keep", "keep_period",
               "watchdog_seconds", "data_workers", "mesh", "sampling")  # fmt: skip


def claim_workdir(workdir: epath.PathLike, config: Config) -> None:
    """Writes config.json, or checks that the existing one belongs to the same run.

    In a multi-process run only process 0 calls it.

    Raises:
      InputError: the workdir holds another run, or checkpoints without config.json; or a finished
        cosine run is extended without `optimizer.restart_step`.
    """
    workdir = epath.Path(workdir)
    path, restart = workdir / "config.json", config.optimizer.restart_step
    if path.exists():
        before = read_config(workdir)
        if restart and restart == before.steps == _finished(workdir):
            optimizer = dataclasses.replace(before.optimizer, restart_step=restart)
            before = dataclasses.replace(before, steps=config.steps, optimizer=optimizer)
        old, new = _flat(before.to_dict()), _flat(config.to_dict())
        changed = [
            f"{key} (was {old.get(key)!r}, now {new.get(key)!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] not in _MAY_CHANGE
        ]
        require(not changed, f"{workdir} holds another run: {', '.join(changed)}; nothing was "
                             "changed, use a new --workdir")  # fmt: skip
        _check_extension(workdir, before, config)
    else:
        require(
            not (workdir / "checkpoints").exists(),
            f"{workdir} has checkpoints but no config.json; nothing was changed",
        )
        require(
            not restart,
            f"optimizer.restart_step={restart} extends a finished run, {workdir} is new",
        )
        workdir.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(config.to_json(), encoding="utf-8")
    if 0 < _finished(workdir) < config.steps:
        (workdir / "done.json").unlink()


def _check_extension(workdir: epath.Path, before: Config, config: Config) -> None:
    """Raises InputError if a finished run would jump to the learning rate of a longer cosine."""
    c, finished = before.optimizer, _finished(workdir)
    jumps = c.schedule == "cosine" and c.restart_step + c.warmup_steps < finished < config.steps
    require(
        not jumps or finished != before.steps,
        f"{workdir} ended its cosine at step {finished}, and the learning rate of steps="
        f"{config.steps} would jump there: warm up and decay again with "
        f"--config.optimizer.restart_step={finished}; nothing was changed",
    )


def _finished(workdir: epath.Path) -> int:
    """The last step of a finished run; 0 if it has not finished."""
    done = workdir / "done.json"
    return json.loads(done.read_text(encoding="utf-8"))["step"] if done.exists() else 0


def read_config(workdir: epath.PathLike) -> Config:
    """The config of a workdir.

    Raises:
      InputError: the workdir has no config.json.
    """
    path = epath.Path(workdir) / "config.json"
    require(path.exists(), f"{workdir} holds no trained model: it has no config.json")
    return make_config(json.loads(path.read_text(encoding="utf-8")))


def mark_done(workdir: epath.PathLike, config: Config, step: int, seconds: float) -> None:
    """Writes done.json; `claim_workdir` removes it when the run is extended to more steps."""
    values = {"step": step, "name": config.name, "train_seconds": seconds}
    if jax.process_index() == 0:
        with atomic_write(epath.Path(workdir) / "done.json") as file:
            file.write_text(json.dumps(values) + "\n", encoding="utf-8")


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
