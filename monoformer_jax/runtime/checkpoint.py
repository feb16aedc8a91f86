"""Checkpoints (orbax): parameters, EMA, optimizer state, step and data position.

WORKDIR/checkpoints/STEP/params/    float32 weights
                        /ema/       exponential moving average of the weights, used for sampling
                        /optimizer/
                        /data/      {"streams": state of each stream of rows}
                        /meta/      {"step", "train_seconds"}; of converted weights also "untrained"
WORKDIR/damaged/STEP/               checkpoints that could not be read, moved here

A checkpoint can be restored on any mesh, with any number of devices and processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from monoformer_jax.data.pipeline import RowIterator
from monoformer_jax.errors import InputError
from monoformer_jax.runtime.processes import allgather_json

# A `training.state.TrainState`: params, ema, opt_state and step are saved.
State = Any
# Status codes of storage and device errors, which do not mean that the checkpoint is damaged.
_NOT_DAMAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED",
               "RESOURCE_EXHAUSTED")  # fmt: skip


class Checkpoints:
    """The checkpoints of one workdir. Saves are asynchronous; leaving `with` waits for them."""

    def __init__(self, workdir: epath.PathLike, kept: int | None = None, keep_every: int = 0):
        """Args:
        workdir: folder of the run.
        kept: number of newest checkpoints to keep; None opens the folder read-only.
        keep_every: also keeps the checkpoints at multiples of this step; 0 disables it.
        """
        workdir = epath.Path(workdir).expanduser().absolute()
        self.folder, self.damaged_folder = workdir / "checkpoints", workdir / "damaged"
        # Orbax warns through absl about inferred shardings; shardings are always given here.
        logging.getLogger("absl").setLevel(logging.ERROR)
        reads = kept is None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=kept, keep_period=keep_every or None, create=not reads, read_only=reads
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; an interrupted save does not count."""
        return self._manager.latest_step()

    def save(self, state: State, data: RowIterator, seconds: float) -> None:
        """Starts an asynchronous save; every process must call it after the same step."""
        step = int(state.step)
        streams = {
            number: s for states in allgather_json(data.get_state()) for number, s in states.items()
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave(state.opt_state),
                data=ocp.args.JsonSave({"streams": streams}),
                meta=ocp.args.JsonSave({"step": step, "train_seconds": seconds}),
            ),
        )

    def wait(self) -> None:
        """Waits until all saves are complete; raises the error of a failed asynchronous save."""
        self._manager.wait_until_finished()

    def restore(self, target: State, data: RowIterator) -> tuple[State, float, dict[int, str]]:
        """Restores the newest checkpoint that every process can read, and the position of `data`.

        Args:
          target: abstract state; the result has its shardings and dtypes.

        Returns:
          The state, the seconds trained, and {step: reason} of the newer checkpoints that could not be
          read and were moved to WORKDIR/damaged.

        Raises:
          InputError: no checkpoint can be read; none is moved.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            restored, problem = self._try(step, target, data)
            problems = [
                p for p in allgather_json(problem) if p
            ]  # the read may fail on one process only
            if restored and not problems:
                self._move_away(list(damaged))
                return *restored, damaged
            damaged[step] = problems[0]
        raise InputError(
            f"no checkpoint in {self.folder} can be read; none was moved: "
            + "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        )

    def _try(self, step: int, target: State, data: RowIterator):
        """Returns ((state, seconds), ""), or (None, reason) if this process cannot read the step."""
        # CheckpointManager.restore has a barrier, at which it would wait for a failed process.
        folder, read = self.folder / str(step), _read_arrays
        try:
            meta = _read_json(folder / "meta")
            data.set_state(_read_json(folder / "data")["streams"])
            step = jax.make_array_from_callback(
                (), target.step.sharding, lambda _: np.int32(meta["step"])
            )
            state = target.replace(
                step=step,
                params=read(folder / "params", target.params),
                ema=read(folder / "ema", target.ema),
                opt_state=read(folder / "optimizer", target.opt_state),
            )
            return (jax.block_until_ready(state), meta["train_seconds"]), ""
        except Exception as error:  # damaged files raise errors of many types
            if not _is_damage(error):
                raise
            return None, f"{type(error).__name__}: {_first_line(error)}"

    def _move_away(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            self.damaged_folder.mkdir(exist_ok=True)
            for step in steps:
                to, again = self.damaged_folder / str(step), 1
                while to.exists():
                    to, again = to.with_name(f"{step}.{again}"), again + 1
                (self.folder / str(step)).rename(to)
        allgather_json(None)  # barrier: every process reloads after the renaming
        self._manager.reload()

    def restore_ema(self, target: dict) -> tuple[dict, dict]:
        """Restores the EMA weights alone, with the shardings and dtypes of `target`.

        Returns:
          The weights, and {"step", "train_seconds"}.

        Raises:
          InputError: there is no checkpoint, or the newest cannot be read.
        """
        weights, meta = self._newest(
            lambda folder: (_read_arrays(folder / "ema", target), _read_json(folder / "meta"))
        )
        return weights, {name: meta[name] for name in ("step", "train_seconds")}

    def untrained(self) -> list[str]:
        """Modules that `convert` initialised, as the source has none; see `restore_ema`."""
        return self._newest(lambda folder: _read_json(folder / "meta")).get("untrained", [])

    def restore_one(self, part: str, path: Sequence[str], target: jax.ShapeDtypeStruct):
        """One parameter of "ema" or "params" as numpy, for models larger than the memory."""
        item, args = target, ocp.RestoreArgs(restore_type=np.ndarray)
        for name in reversed(path):
            item, args = {name: item}, {name: args}
        args = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)

        def read(folder):
            return ocp.PyTreeCheckpointHandler().restore(folder / part, args=args)

        return jax.tree.leaves(self._newest(read))[0]

    @property
    def has_params(self) -> bool:
        """Whether the newest checkpoint has `params` besides `ema`; a converted one may not."""
        return self.latest is not None and (self.folder / str(self.latest) / "params").is_dir()

    def save_weights(
        self, parts: Mapping[str, Callable[[], dict]], untrained: Sequence[str] = ()
    ) -> None:
        """Saves converted weights as step 0, with one part in memory at a time.

        Args:
          parts: {"ema": read, "params": read}, "params" optional; `read()` returns float32 arrays.
          untrained: modules that are newly initialised, see `untrained()`.
        """
        meta = {"step": 0, "train_seconds": 0.0, "untrained": list(untrained)}
        meta = ocp.args.JsonSave(meta)
        self._manager.save(0, args=ocp.args.Composite(meta=meta))
        self._manager.wait_until_finished()
        host = jax.local_devices(backend="cpu")[0]
        for name, read in parts.items():
            # Small files limit memory: orbax buffers unwritten data up to the size of a file.
            args = ocp.args.PyTreeSave(
                jax.device_put(read(), host), ocdbt_target_data_file_size=64 * 2**20
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(self.folder / "0" / name, args=args)

    def _newest(self, read: Callable[[epath.Path], Any]) -> Any:
        step = self.latest
        if step is None:
            raise InputError(f"there is no complete checkpoint in {self.folder}")
        folder = self.folder / str(step)
        try:
            return read(folder)
        except Exception as error:
            if not _is_damage(error):
                raise
            older = [s for s in self._manager.all_steps() if s < step]
            then = f"; if you remove it, step {max(older)} is the newest" if older else ""
            raise InputError(
                f"checkpoint {folder} cannot be read, it is damaged or incomplete{then} "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        # close() has a barrier, which the other processes may never reach after an error.
        if kind is None or jax.process_count() == 1:
            self._manager.close()


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Whether a workdir, which may not exist, holds a complete checkpoint."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        return False
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest is not None


def _read_arrays(folder: epath.Path, target: dict) -> dict:
    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))


def _read_json(folder: epath.Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(folder)


def _is_damage(error: Exception) -> bool:
    """Whether the checkpoint itself caused a read error, rather than the machine or the network."""
    external = MemoryError | PermissionError | ConnectionError | TimeoutError
    return not isinstance(error, external) and not any(w in str(error) for w in _NOT_DAMAGE)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
