"""Checkpoints (orbax): params, ema, optimizer, step and data iterator together.

WORKDIR/config.json                 from which every command rebuilds the model
WORKDIR/checkpoints/STEP/params/    float32 weights
                        /ema/       their moving average, which is what samples
                        /optimizer/
                        /data/      state of the grain iterator
                        /meta/      {"step", "train_seconds"}
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from monoformer_jax.config import Config, InputError, MeshConfig, ModelConfig, require
from monoformer_jax.parallel import make_mesh
from monoformer_jax.training.state import TrainState, abstract_state

# Keys of the config that a run may change when it goes on; all others make it another run.
_MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "checkpoints_kept", "mesh", "sampling")


class Checkpoints:
    """The checkpoints of one workdir. Saves run in the background; leaving `with` waits for them."""

    def __init__(self, workdir: Path, kept: int | None = None):
        """Args:
        workdir: folder of the run.
        kept: how many checkpoints stay, the oldest go; None only reads.
        """
        self.folder = workdir.absolute() / "checkpoints"
        # Orbax warns about every sharding that it infers; ours are always given.
        logging.getLogger("absl").setLevel(logging.ERROR)
        reads = kept is None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=kept, create=not reads, read_only=reads
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; one cut short by a kill does not count."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: grain.DatasetIterator, seconds: float) -> None:
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave(state.opt_state),
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave({"step": step, "train_seconds": seconds}),
            ),
        )

    def restore(self, target: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, float]:
        """The newest state, placed as `target` says, and the seconds trained; moves `data` there.

        Raises:
          InputError: the checkpoint cannot be read.
        """
        restored = self._restore(
            params=ocp.args.StandardRestore(target.params),
            ema=ocp.args.StandardRestore(target.ema),
            optimizer=ocp.args.StandardRestore(target.opt_state),
            data=grain.checkpoint.CheckpointRestore(data),
            meta=ocp.args.JsonRestore(),
        )
        step = jax.device_put(restored.meta["step"], target.step.sharding).astype("int32")
        state = TrainState(step, restored.params, restored.ema, restored.optimizer)
        return state, restored.meta["train_seconds"]

    def restore_ema(self, target: dict) -> tuple[dict, dict]:
        """Only the averaged weights, and {"step", "train_seconds"}."""
        restored = self._restore(ema=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        return restored.ema, restored.meta

    def restore_one(self, part: str, path: Sequence[str], target: jax.ShapeDtypeStruct):
        """One parameter of "ema" or "params", as numpy, for those who cannot hold all of them."""
        item, args = target, ocp.RestoreArgs(restore_type=np.ndarray)
        for name in reversed(path):
            item, args = {name: item}, {name: args}
        args = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
        return jax.tree.leaves(self._restore(**{part: args})[part])[0]

    @property
    def has_params(self) -> bool:
        """Whether the newest checkpoint has more than averaged weights; a converted one may not."""
        return self.latest is not None and (self.folder / str(self.latest) / "params").is_dir()

    def save_weights(self, parts: Mapping[str, Callable[[], dict]]) -> None:
        """Step 0 of a folder that no run made: weights alone, one part in memory at a time.

        Args:
          parts: "ema", and "params" where it is known: what reads the float32 arrays of each.
        """
        meta = ocp.args.JsonSave({"step": 0, "train_seconds": 0.0})
        self._manager.save(0, args=ocp.args.Composite(meta=meta))
        self._manager.wait_until_finished()
        host = jax.local_devices(backend="cpu")[0]
        for name, read in parts.items():
            # Small files: orbax holds what it has not yet written, up to the size of a file.
            args = ocp.args.PyTreeSave(
                jax.device_put(read(), host), ocdbt_target_data_file_size=64 * 2**20
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(self.folder / "0" / name, args=args)

    def _restore(self, **items):
        step = self.latest
        if step is None:
            raise InputError(f"there is no complete checkpoint in {self.folder}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises whatever the broken part raised
            older = [s for s in self._manager.all_steps() if s < step]
            then = f"go on from step {older[-1]}" if older else "start over"
            raise InputError(
                f"checkpoint {self.folder / str(step)} cannot be read, it is damaged or incomplete; "
                f"remove that folder to {then} ({type(error).__name__}: {_first_line(error)})"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes config.json, or checks that the one that is there belongs to the same run.

    Raises:
      InputError: the workdir holds another run, or checkpoints without their config.
    """
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
    written = path.with_suffix(".json.new")
    written.write_text(config.to_json())
    written.replace(path)


def read_config(workdir: Path) -> Config:
    """The config of a trained workdir.

    Raises:
      InputError: there is none.
    """
    path = workdir / "config.json"
    require(path.exists(), f"{workdir} holds no trained model: it has no config.json")
    return Config.from_dict(json.loads(path.read_text()))


def load_trained(workdir: Path) -> tuple[Config, dict, dict]:
    """Config, averaged weights and {"step", "train_seconds"} of the newest checkpoint.

    The weights come to one device, whatever mesh they were trained on.

    Raises:
      InputError: no trained model there, or a checkpoint that cannot be read.
    """
    config = read_config(workdir)
    one_device = make_mesh(MeshConfig(), jax.local_devices()[:1])
    target = abstract_state(config, one_device).ema
    with Checkpoints(workdir) as checkpoints:
        params, meta = checkpoints.restore_ema(target)
    return config, params, meta


def load_weights(workdir: Path, target: dict, model: ModelConfig) -> dict:
    """Averaged weights of another run, placed as `target` says, for a run of this model.

    Raises:
      InputError: there is no model, or one with other parameters.
    """
    there = read_config(workdir).model
    # How it is computed may differ; what its parameters are may not.
    changed = [
        f"{field.name} ({getattr(there, field.name)!r} there, {getattr(model, field.name)!r} now)"
        for field in dataclasses.fields(there)
        if field.name not in ("dtype", "remat", "attention")
        and getattr(there, field.name) != getattr(model, field.name)
    ]
    require(not changed, f"init_from={workdir} holds another model: {', '.join(changed)}")
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_ema(target)[0]


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
