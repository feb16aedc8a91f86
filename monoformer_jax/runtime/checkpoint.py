"""Checkpoints (orbax): parameters, EMA, optimizer state, step and data position.

WORKDIR/checkpoints/STEP/params/    float32 weights
                        /ema/       exponential moving average of the weights, used for sampling
                        /optimizer/
                        /data/      {"streams": state of each stream of rows}
                        /meta/      {"step", "train_seconds"}; with held-out losses, if they were
                                    measured at this step; of converted weights also "untrained"
                        /checksums.json   see `runtime.checksums`; read before anything else
WORKDIR/damaged/STEP/               checkpoints that are damaged, moved here

A checkpoint can be restored on any mesh, with any number of devices and processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from monoformer_jax.data.pipeline import RowIterator
from monoformer_jax.errors import InputError, require
from monoformer_jax.runtime.checksums import (
    Damaged,
    commit_class,
    explain,
    find_problem,
    is_damage,
    verify_files,
    write_checksums,
)
from monoformer_jax.runtime.processes import allgather_json
from monoformer_jax.runtime.workdir import list_steps

# A `training.state.TrainState`: params, ema, opt_state and step are saved.
State = Any


class Checkpoints:
    """The checkpoints of one workdir. Saves are asynchronous; leaving `with` waits for them."""

    def __init__(self, workdir: epath.PathLike, kept: int | None = None, keep_every: int = 0):
        """Args:
        workdir: folder of the run.
        kept: number of newest checkpoints to keep, besides the best one; None opens the folder
          read-only.
        keep_every: also keeps the checkpoints at multiples of this step; 0 disables it.

        Raises:
          InputError: orbax cannot write to a folder of this name.
        """
        workdir = epath.Path(workdir).expanduser().absolute()
        self.folder, self.damaged_folder = workdir / "checkpoints", workdir / "damaged"
        self._manager, self._unconfirmed = None, None
        if kept is not None:
            require_plain(workdir)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._preserved(kept, keep_every),
                    cleanup_tmp_directories=True, temporary_path_class=commit_class(self.folder),
                ),
            )  # fmt: skip

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; an interrupted save does not count."""
        return list_steps(self.folder)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the complete checkpoint with the lowest held-out loss; None: none was measured."""
        losses = {}
        for step in self.steps:
            with contextlib.suppress(Damaged, OSError, ValueError, LookupError):
                losses[step] = _read_meta(self.folder / str(step))["val_loss"]
        return min(losses, key=losses.__getitem__) if losses else None

    def _preserved(self, kept: int, keep_every: int) -> policies.PreservationPolicy:
        several = [policies.LatestN(kept), _Best(self)]
        several += [policies.EveryNSteps(keep_every)] if keep_every else []
        return policies.AnyPreservationPolicy(several)

    def save(
        self,
        state: State,
        data: RowIterator,
        seconds: float,
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """Starts an asynchronous save; every process must call it after the same step.

        Args:
          measured: held-out losses at this step; "val_loss" decides which checkpoint is the best.
        """
        self.wait()
        step = int(state.step)
        meta = {**(measured or {}), "step": step, "train_seconds": seconds}
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
                meta=ocp.args.JsonSave(meta),
            ),
        )
        path, leaf = min(jax.tree.leaves_with_path(state.params), key=lambda item: item[1].size)
        self._unconfirmed = step, path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def wait(self) -> None:
        """Waits until all saves are complete, and reads a little of the last one back.

        Raises:
          RuntimeError: what was saved cannot be read; errors of a failed save are raised too.
        """
        self._manager.wait_until_finished()
        if self._unconfirmed is None:
            return
        (step, path, leaf), self._unconfirmed = self._unconfirmed, None
        folder = self.folder / str(step)
        try:
            _read_meta(folder)
            _read_one(folder / "params", [key.key for key in path], leaf)
        except Exception as error:
            raise RuntimeError(
                f"checkpoint {folder} was saved, but cannot be read ({explain(error)})"
            ) from error

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
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            # The read may fail on one process only; each one reads its share of the files.
            share = jax.process_index(), jax.process_count()
            restored, problem = None, find_problem(verify_files, self.folder / str(step), (), share)
            problems = [p for p in allgather_json(problem) if p]
            if not problems:
                restored, problem = self._try(step, target, data)
                problems = [p for p in allgather_json(problem) if p]
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
        folder, read, restored = self.folder / str(step), _read_arrays, []

        def restore():
            meta = _read_meta(folder)
            data.set_state(_read_json(folder / "data")["streams"])
            state = target.replace(
                step=jax.make_array_from_callback(
                    (), target.step.sharding, lambda _: np.int32(step)
                ),
                params=read(folder / "params", target.params),
                ema=read(folder / "ema", target.ema),
                opt_state=read(folder / "optimizer", target.opt_state),
            )
            _require_finite(params=state.params, ema=state.ema, optimizer=state.opt_state)
            restored.append((jax.block_until_ready(state), meta["train_seconds"]))

        problem = find_problem(restore)
        return (None, problem) if problem else (restored[0], "")

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

    def restore_ema(
        self, target: dict, step: int | Literal["best"] | None = None
    ) -> tuple[dict, dict]:
        """Restores the EMA weights alone, with the shardings and dtypes of `target`.

        Args:
          step: of the checkpoint; "best": that with the lowest held-out loss; None: the newest.

        Returns:
          The weights, and {"step", "train_seconds"}.

        Raises:
          InputError: there is no such checkpoint, or it cannot be read.
        """

        def read(folder):
            verify_files(folder, ("ema", "meta"))
            meta, ema = _read_meta(folder), _read_arrays(folder / "ema", target)
            _require_finite(ema=ema)
            return ema, meta

        weights, meta = self._newest(read) if step is None else self._read(self._find(step), read)
        return weights, {name: meta[name] for name in ("step", "train_seconds")}

    def untrained(self) -> list[str]:
        """Modules that `convert` initialised, as the source has none; see `restore_ema`."""

        def read(folder):
            verify_files(folder, ("meta",))
            return _read_meta(folder)

        return self._newest(read).get("untrained", [])

    def verify(self, step: int) -> str:
        """What is wrong with a checkpoint, all of its files and weights; "" if nothing is."""
        folder = self.folder / str(step)

        def read():
            verify_files(folder)
            _read_meta(folder)
            for part in ("params", "ema"):
                if not (folder / part).is_dir():  # a converted checkpoint
                    continue
                leaves = ocp.PyTreeCheckpointHandler().metadata(folder / part).tree
                for path, leaf in jax.tree.leaves_with_path(leaves):
                    value = _read_one(folder / part, [key.key for key in path], leaf)
                    if not np.isfinite(value).all():
                        raise Damaged(f"{part}{jax.tree_util.keystr(path)} is not finite")

        return find_problem(read)

    def restore_one(self, part: str, path: Sequence[str], target: jax.ShapeDtypeStruct):
        """One parameter of "ema" or "params" as numpy, for models larger than the memory."""
        return self._newest(lambda folder: _read_one(folder / part, path, target))

    def verify_newest(self, parts: Sequence[str] = ()) -> None:
        """Raises InputError if the newest checkpoint is damaged, or there is none.

        Args:
          parts: parts to check; none: all.
        """
        self._newest(lambda folder: verify_files(folder, parts))

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
        write_checksums(self.folder / "0")  # anew, as orbax committed the step before its parts

    def _newest(self, read: Callable[[epath.Path], Any]) -> Any:
        step = self.latest
        if step is None:
            raise InputError(f"there is no complete checkpoint in {self.folder}")
        return self._read(step, read)

    def _find(self, step: int | Literal["best"]) -> int:
        if step == "best":
            step = self.best
            require(
                step is not None,
                f"{self.folder} has no best checkpoint: no held-out loss was measured, see "
                "data.validation_split",
            )
        steps = self.steps
        require(
            step in steps,
            f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}",
        )
        return step

    def _read(self, step: int, read: Callable[[epath.Path], Any]) -> Any:
        folder = self.folder / str(step)
        try:
            return read(folder)
        except Exception as error:
            if not is_damage(error):
                raise
            older = [s for s in self.steps if s < step]
            then = f"; if you remove it, step {max(older)} is the newest" if older else ""
            raise InputError(
                f"checkpoint {folder} cannot be read, it is damaged or incomplete{then} "
                f"({explain(error)})"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        # close() has a barrier, which the other processes may never reach after an error.
        if self._manager is not None and (kind is None or jax.process_count() == 1):
            self._manager.close()


@dataclasses.dataclass
class _Best(policies.PreservationPolicy):
    """Keeps the best of the checkpoints that are complete."""

    saved: Checkpoints

    def should_preserve(self, checkpoints, *, context):
        best = self.saved.best
        return [checkpoint.step == best for checkpoint in checkpoints]


def require_plain(workdir: epath.Path) -> None:
    """Raises InputError if orbax, which takes a path for a pattern, cannot write to this folder."""
    found = [c for c in "[]*?" if c in str(workdir)]
    require(
        not found,
        f"{workdir} has {' '.join(found)} in its name: orbax takes such names for patterns and cannot "
        "write checkpoints there; choose another folder",
    )


def _read_meta(folder: epath.Path) -> dict:
    meta = _read_json(folder / "meta")
    if meta["step"] != int(folder.name):
        raise Damaged(f"the folder holds step {meta['step']}")
    return meta


def _require_finite(**parts: dict) -> None:
    finite = {name: bool(ok) for name, ok in jax.jit(_finite)(parts).items()}
    if not all(finite.values()):
        bad = [name for name, ok in finite.items() if not ok]
        raise Damaged(f"{' and '.join(bad)} not finite")


def _finite(parts: dict) -> dict:
    return {
        name: jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
        for name, tree in parts.items()
    }


def _read_one(folder: epath.Path, path: Sequence[str], leaf: Any) -> np.ndarray:
    """One parameter of a part, as numpy, with the shape and dtype of `leaf`."""
    item = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    args = ocp.RestoreArgs(restore_type=np.ndarray)
    for name in reversed(path):
        item, args = {name: item}, {name: args}
    args = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    return jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder, args=args))[0]


def _read_arrays(folder: epath.Path, target: dict) -> dict:
    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))


def _read_json(folder: epath.Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(folder)
