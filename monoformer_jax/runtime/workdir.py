"""The folder of a run, or storage such as gs://bucket/run: whose it is, and whether it is done.

WORKDIR/config.json     from which every command rebuilds the model
WORKDIR/done.json       {"step", "name", "train_seconds"} once the last step is saved

Checkpoints, metrics and faults name their own files there (see the modules of those names).
"""

from __future__ import annotations

import json

import jax
from etils import epath

from monoformer_jax.config import Config
from monoformer_jax.errors import require
from monoformer_jax.files import atomic_write

# Keys of the config that a run may change when it goes on; all others make it another run.
_MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "max_to_keep", "keep_period",
               "watchdog_seconds", "mesh", "sampling")  # fmt: skip


def claim_workdir(workdir: epath.PathLike, config: Config) -> None:
    """Writes config.json, or checks that the one that is there belongs to the same run.

    Of several processes the first does it.

    Raises:
      InputError: the workdir holds another run, or checkpoints without their config.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if path.exists():
        there, new = _flat(read_config(workdir).to_dict()), _flat(config.to_dict())
        changed = [
            f"{key} ({there.get(key)!r} there, {new.get(key)!r} now)"
            for key in sorted(there.keys() | new.keys())
            if there.get(key) != new.get(key) and key.split(".")[0] not in _MAY_CHANGE
        ]
        require(not changed, f"{workdir} holds another run: {', '.join(changed)}; nothing was "
                             "touched, give a new --workdir")  # fmt: skip
    else:
        require(
            not (workdir / "checkpoints").exists(),
            f"{workdir} has checkpoints but no config.json to say what they are; nothing was touched",
        )
        workdir.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(config.to_json())
    done = workdir / "done.json"
    if done.exists() and json.loads(done.read_text())["step"] < config.steps:
        done.unlink()


def read_config(workdir: epath.PathLike) -> Config:
    """The config of a trained workdir.

    Raises:
      InputError: there is none.
    """
    path = epath.Path(workdir) / "config.json"
    require(path.exists(), f"{workdir} holds no trained model: it has no config.json")
    return Config.from_dict(json.loads(path.read_text()))


def mark_done(workdir: epath.PathLike, config: Config, step: int, seconds: float) -> None:
    """Writes done.json, for whoever waits for the run; `claim_workdir` takes it away for more steps."""
    values = {"step": step, "name": config.name, "train_seconds": seconds}
    if jax.process_index() == 0:
        with atomic_write(epath.Path(workdir) / "done.json") as file:
            file.write_text(json.dumps(values) + "\n")


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
