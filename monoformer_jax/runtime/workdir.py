"""The folder of a run, or storage such as gs://bucket/run: its config and its completion marker.

WORKDIR/config.json     from which every command rebuilds the model
WORKDIR/tokenizer.json  unless data.tokenizer is "bytes"
WORKDIR/done.json       {"step", "name", "train_seconds"}, written when the last step is saved

The modules checkpoint, lock, metrics and faults list their own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable

import jax
from etils import epath

from monoformer_jax.config import Config
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import atomic_write, expand, read_json
from monoformer_jax.models import make_config

# Config keys that may change when a run is resumed; `claim_workdir` rejects any other change.
_MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "max_to_keep", "keep_period",
               "watchdog_seconds", "data_workers", "compiler_options", "mesh", "sampling",
               "validation")  # fmt: skip

# Key of the full Config in the config.json of an exported model, see `pretrained.conversion`.
EXPORTED = "monoformer_jax"
SHIPPED = epath.Path(__file__).parent.parent / "shipped"  # a folder for each model

_TOKENIZER = "tokenizer.json"
# Temporary names of the files that a trainer writes, see `files.atomic_write`.
_STAGING = tuple(f".{name}." for name in ("config.json", "tokenizer.json", "metrics.jsonl", "done.json",
                                          "starts.json", "trainer.json"))  # fmt: skip


def claim_workdir(
    workdir: epath.PathLike, config: Config, tokenizer: epath.PathLike | None = None
) -> None:
    """Writes config.json and tokenizer.json, or checks that the existing ones belong to the same run.

    A workdir belongs to a run from its first checkpoint on. In a multi-process run only process 0 calls
    it, while it holds the `WorkdirLock`.

    Args:
      tokenizer: file of the run's tokenizer, unless data.tokenizer is "bytes".

    Raises:
      InputError: the workdir holds another run, or its checkpoints or its config were lost; or a
        finished cosine run is extended without `optimizer.restart_step`.
    """
    workdir = epath.Path(workdir)
    stored, restart = portable_paths(workdir, config), config.optimizer.restart_step
    text = None if tokenizer is None else epath.Path(tokenizer).read_bytes()
    if list_steps(workdir / "checkpoints"):
        before = read_config(workdir)
        if restart and restart == before.steps == _finished(workdir):
            optimizer = dataclasses.replace(before.optimizer, restart_step=restart)
            before = dataclasses.replace(before, steps=config.steps, optimizer=optimizer)
        changed = _changed(before, absolute_paths(workdir, stored))
        if text is not None and text != _content(workdir / _TOKENIZER):
            changed.append(f"data.tokenizer (another file than {workdir / _TOKENIZER})")
        require(not changed, f"{workdir} holds another run: {', '.join(changed)}; nothing was "
                             "changed, use a new --workdir")  # fmt: skip
        _check_extension(workdir, before, config)
    else:
        _require_unsaved(workdir)
        require(
            not restart,
            f"optimizer.restart_step={restart} extends a finished run, {workdir} is new",
        )
        workdir.mkdir(parents=True, exist_ok=True)
        if _content(workdir / "config.json") != stored.to_json().encode():
            _set_metrics_aside(workdir)
    for path in workdir.iterdir():  # what an `atomic_write` left when it was killed
        if path.name.startswith(_STAGING) and path.suffix == ".new":
            path.unlink(missing_ok=True)
    if text is not None:
        with atomic_write(workdir / _TOKENIZER) as file:
            file.write_bytes(text)
    with atomic_write(workdir / "config.json") as file:
        file.write_text(stored.to_json(), encoding="utf-8")
    if _finished(workdir) < config.steps:
        (workdir / "done.json").unlink(missing_ok=True)


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
    return read_done(workdir).get("step", 0)


def _content(path: epath.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _set_metrics_aside(workdir: epath.Path) -> None:
    """Keeps the history of another command, which ended here before its first checkpoint."""
    file, number = workdir / "metrics.jsonl", 1
    if not file.exists():
        return
    while (workdir / f"metrics.{number}.jsonl").exists():
        number += 1
    file.rename(workdir / f"metrics.{number}.jsonl")


def _changed(old: Config, new: Config) -> list[str]:
    old, new = flatten(old.to_dict()), flatten(new.to_dict())
    return [
        f"{key} (was {old.get(key)!r}, now {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in _MAY_CHANGE
    ]


def _require_unsaved(workdir: epath.Path) -> None:
    """Raises InputError if there was a checkpoint: then a start from step 0 would end its history."""
    lines = step = 0
    for line in (_content(workdir / "metrics.jsonl") or b"").splitlines():
        with contextlib.suppress(ValueError, TypeError, LookupError):
            step, lines = max(step, json.loads(line)["step"]), lines + 1
    found = [f"metrics up to step {step}"] if lines else []
    lost = bool(lines) and "://" not in str(workdir) and not (workdir / "checkpoints").is_dir()
    with contextlib.suppress(InputError):
        # A save is complete before the next one starts, so then there was one.
        lost |= step > 2 * read_config(workdir).checkpoint_every
    if (workdir / "done.json").exists():
        found, lost = [*found, "done.json"], True
    require(
        not lost,
        f"{workdir} has {' and '.join(found)} but no checkpoint: restore its folder checkpoints/ "
        "from a copy, or use another --workdir; nothing was changed",
    )


def portable_paths(workdir: epath.PathLike, config: Config) -> Config:
    """The config as config.json keeps it: its paths do not depend on the current folder.

    A path that is given relative to the current folder is kept relative to the workdir, so that both
    can be moved together; others are absolute. `tokenizer.json` is copied into the workdir.
    """

    def change(path: str) -> str:
        if "://" in path:
            return path
        given = os.path.expanduser(path)
        there = os.path.abspath(given)
        keep = os.path.isabs(given) or "://" in str(workdir)
        return there if keep else os.path.relpath(there, workdir)

    tokenizer = config.data.tokenizer if config.data.tokenizer == "bytes" else _TOKENIZER
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return _with_paths(dataclasses.replace(config, data=data), change)


def absolute_paths(workdir: epath.PathLike, config: Config) -> Config:
    """The config with absolute paths, for use; `config` is one that `portable_paths` returned."""
    scheme, mark, folder = str(workdir).rpartition("://")
    folder = folder if mark else os.path.abspath(folder)

    def change(path: str) -> str:
        if "://" in path or os.path.isabs(path):
            return path
        return scheme + mark + os.path.normpath(os.path.join(folder, path))

    return _with_paths(config, change)


def _with_paths(config: Config, change: Callable[[str], str]) -> Config:
    records, held_out = (
        {name: change(path) for name, path in folders.items()}
        for folders in (config.data.records, config.data.validation_records)
    )
    data = dataclasses.replace(config.data, records=records, validation_records=held_out)
    init_from = change(config.init_from) if config.init_from else ""
    vae = change(config.validation.vae) if config.validation.vae else ""
    validation = dataclasses.replace(config.validation, vae=vae)
    return dataclasses.replace(config, data=data, init_from=init_from, validation=validation)


def list_steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder `checkpoints`, ascending."""
    if not folder.exists():
        return []
    # A local save is renamed when it is complete; an object storage has no renames, only a mark.
    marked = "://" in str(folder)
    return sorted(
        int(path.name) for path in folder.iterdir()
        if path.name.isdigit() and (not marked or (path / "commit_success.txt").exists())
    )  # fmt: skip


def model_folder(name: epath.PathLike) -> epath.Path:
    """The folder of a run, or of the model of this name that comes with the package."""
    folder, shipped = expand(name), SHIPPED / str(name)
    return shipped if not folder.exists() and str(name) in shipped_models() else folder


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def read_config(workdir: epath.PathLike) -> Config:
    """The config of a workdir or of an exported model, with absolute paths.

    Raises:
      InputError: there is no such folder, it has no config.json, or that is damaged.
    """
    path = epath.Path(workdir).expanduser() / "config.json"
    reason = "it has no config.json"
    if not path.parent.exists():
        names = ", ".join(shipped_models())
        reason = (
            f"there is no such folder, and no model of that name comes with the package ({names})"
        )
    require(path.exists(), f"{workdir} holds no trained model: {reason}")
    try:
        values = read_json(path)
    except InputError as error:
        raise InputError(
            f"{path} is damaged ({error}): write it anew from a copy or from the config of the run"
        ) from error
    if isinstance(values, dict):
        values = values.get(EXPORTED, values)
    return absolute_paths(path.parent, make_config(values))


def read_done(workdir: epath.PathLike) -> dict:
    """The content of done.json; {} if there is none, or it is damaged."""
    try:
        return dict(json.loads((epath.Path(workdir) / "done.json").read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def mark_done(workdir: epath.PathLike, config: Config, step: int, seconds: float) -> None:
    """Writes done.json; `claim_workdir` removes it when the run is extended to more steps."""
    values = {"step": step, "name": config.name, "train_seconds": seconds}
    if jax.process_index() == 0:
        with atomic_write(epath.Path(workdir) / "done.json") as file:
            file.write_text(json.dumps(values) + "\n", encoding="utf-8")


def flatten(values: dict, prefix: str = "") -> dict:
    """Values of a nested dict by their path, such as "data.streams"."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
