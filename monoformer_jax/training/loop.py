"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from tqdm import tqdm

from monoformer_jax import batch as contract
from monoformer_jax.config import Config, LoraConfig
from monoformer_jax.data.documents import describe
from monoformer_jax.data.pipeline import Batches, count_skipped, default_workers
from monoformer_jax.data.records import fingerprint
from monoformer_jax.data.tokenizer import Tokenizer, open_tokenizer
from monoformer_jax.errors import require
from monoformer_jax.nn import lora
from monoformer_jax.parallel import local_rows, put_batch
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.faults import (
    CrashLoopGuard,
    NonFiniteLoss,
    Preempted,
    Preemption,
    Watchdog,
)
from monoformer_jax.runtime.lock import WorkdirLock
from monoformer_jax.runtime.processes import allgather_json, require_agreement, run_on_first
from monoformer_jax.runtime.weights import check_init_from, load_weights
from monoformer_jax.runtime.workdir import (
    claim_workdir,
    flatten,
    list_steps,
    mark_done,
    portable_paths,
    read_config,
)
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training.metrics import TrainMetrics
from monoformer_jax.training.progress import Progress
from monoformer_jax.training.state import (
    TrainState,
    abstract_train_state,
    check_layout,
    init_train_state,
    make_train_step,
)


class Validation(Protocol):
    """What a run measures and shows besides its losses, see `evaluation.validation.Validation`."""

    def due(self, step: int) -> bool:
        """Whether `run` is called after this step; step 0 is before the first one."""

    def run(self, step: int, sampler: Sampler, progress: Progress) -> Mapping[str, float]:
        """Every process calls it after the same step; returns what was measured."""

    def report(self) -> None:
        """Called after each `run`, once its results are in metrics.jsonl."""


def train(
    config: Config,
    workdir: epath.PathLike,
    hang_exit_code: int = 1,
    open_validation: Callable[[Sampler, epath.Path], Validation] | None = None,
) -> None:
    """Trains to `config.steps`, resuming from the newest checkpoint in the workdir if there is one.

    Input errors are raised before the step is compiled. Every process of a run calls this function (see
    `processes.start_processes`); process 0 writes and prints.

    Args:
      config: config of the run.
      workdir: folder of the run, or storage such as gs://bucket/run, the same for every process.
      hang_exit_code: exit code if a step takes longer than `config.watchdog_seconds`.
      open_validation: opens what runs every `config.validation.every` steps, given a `Sampler` without
        weights and the workdir; needed if that is above 0.

    Raises:
      InputError: invalid config or data, a workdir that cannot be used, or processes that disagree.
      NonFiniteLoss: names the step, the documents of its batch and the last good checkpoint.
      Preempted: SIGTERM or Ctrl-C was received; the state is saved.
      CrashLoop: several consecutive starts made no checkpoint.
    """
    workdir = epath.Path(workdir).expanduser().absolute()
    _require_same_run(config, workdir)
    with (
        WorkdirLock(workdir) as lock,
        CrashLoopGuard(workdir, max(list_steps(workdir / "checkpoints"), default=None)),
        Watchdog(config.watchdog_seconds, workdir, hang_exit_code) as watchdog,
    ):
        tokenizer = _check_start(config, workdir)
        mesh = check_layout(config)
        target = abstract_train_state(config, mesh)
        rows = local_rows(config.batch_size, mesh)
        batches = Batches(config, tokenizer, rows, default_workers(config), log=_warn)
        _check_first_batch(config, tokenizer, rows)
        validation = None
        if config.validation.every:
            if open_validation is None:
                raise ValueError("config.validation.every needs open_validation")
            # Before anything is written: it reads the held-out examples.
            validation = open_validation(Sampler(config, {}, tokenizer, mesh), workdir)
        file = None if config.data.tokenizer == "bytes" else tokenizer.path
        run_on_first(lambda: claim_workdir(workdir, config, file))
        with (
            contextlib.closing(batches.iterator),
            Checkpoints(workdir, config.max_to_keep, config.keep_period) as checkpoints,
            Preemption() as preemption,
        ):
            state, seconds = _start(config, mesh, target, batches, checkpoints)
            share = len(rows) / config.batch_size
            with Progress(
                workdir, step=int(state.step), steps=config.steps, every=config.log_every,
                seconds=seconds, share=share,
            ) as progress:  # fmt: skip
                _announce(config, workdir, mesh, state, progress)
                for notice in batches.notices:
                    progress.log(notice)
                try:
                    step = _run(config, mesh, state, batches, checkpoints, progress, tokenizer,
                                validation, preemption, watchdog, lock)  # fmt: skip
                except (NonFiniteLoss, Preempted):  # raised by every process after the same step
                    watchdog.beat()
                    checkpoints.wait()
                    raise
                watchdog.beat()
                checkpoints.wait()
                mark_done(workdir, config, step, progress.seconds)
                allgather_json(None)  # no process ends before done.json is written


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _require_same_run(config: Config, workdir: epath.Path) -> None:
    """Raises InputError on all processes if one was started with something else."""
    values = {
        f"config.{k}": v for k, v in flatten(portable_paths(workdir, config).to_dict()).items()
    }
    for name, folder in config.data.records.items():
        values[f"the records {name} with hash"] = fingerprint(folder)
    for name, folder in config.data.validation_records.items():
        values[f"the validation records {name} with hash"] = fingerprint(folder)
    require_agreement(values | {"workdir": str(workdir)})


def _announce(config: Config, workdir: epath.Path, mesh, state, progress: Progress) -> None:
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    progress.log(f"{overview}\n{workdir}: from step {state.step} to {config.steps}, {mesh}")


def _check_start(config: Config, workdir: epath.Path) -> Tokenizer:
    """Checks what the run starts from; returns its tokenizer, by default that of `init_from`."""
    base = epath.Path(config.init_from) if config.init_from else None
    if base is not None and (config.lora.rank or not list_steps(workdir / "checkpoints")):
        check_init_from(base, config.model)
        theirs = read_config(base).data.tokenizer
        require(
            config.data.tokenizer != "bytes" or theirs == "bytes" or not (base / theirs).is_file(),
            f"data.tokenizer='bytes', but init_from={base} was trained with {theirs}: set "
            f"--config.data.tokenizer={theirs}",
        )
    return open_tokenizer(config.data, workdir, config.layout.vocab_size, base)


def _start(config, mesh, target, batches, checkpoints):
    """Returns the initial or restored state, and the seconds trained so far."""
    if checkpoints.latest is not None:
        state, seconds, damaged = checkpoints.restore(target, batches.iterator)
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                print(
                    f"WARNING: checkpoint {step} could not be read and was moved to "
                    f"{checkpoints.damaged_folder}; resuming from step {int(state.step)} ({reason})",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    else:
        state, seconds = init_train_state(config, mesh), 0.0
    fresh = checkpoints.latest is None
    if config.init_from and (fresh or config.lora.rank):
        own = {name: leaf for name, leaf in target.params.items() if name != "lora"}
        weights = load_weights(config.init_from, own | target.frozen, config.model)
        state = state.replace(frozen={name: weights.pop(name) for name in target.frozen})
        if fresh:
            params = state.params | weights
            state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    return state, seconds


def _run(
    config, mesh, state, batches, checkpoints, progress, tokenizer, validation, preemption, watchdog,
    lock,
) -> int:  # fmt: skip
    """Runs the remaining steps; returns the last step."""
    train_step = make_train_step(config, mesh)
    nan_guard = _NanGuard(tokenizer, checkpoints)
    start, metrics = int(state.step), None

    def validate(step: int) -> Mapping[str, float]:
        with progress.paused():
            measured = validation.run(step, _sampler(config, state, tokenizer, mesh), progress)
            watchdog.beat()
        return measured

    def report() -> None:
        with progress.paused():
            validation.report()

    if validation and start == 0:
        progress.write(0, validate(0))
        report()
    for step in range(start + 1, config.steps + 1):
        batch = progress.take(batches.iterator, metrics)
        state, metrics = train_step(state, put_batch(batch, mesh))
        # Checks the previous step, so that the device never waits for the host.
        nan_guard.check(step, metrics, batch)
        watchdog.beat()
        preempted = preemption.reached(step) and step < config.steps
        saves = preempted or step % config.checkpoint_every == 0 or step == config.steps
        measures = bool(validation) and validation.due(step)
        reports = preempted or measures or progress.due(step)
        if saves or reports:
            nan_guard.finish()  # before this step is saved or reported
        measured = validate(step) if measures else {}
        progress.add(metrics, batch)
        if reports:
            progress.report(step, _skipped(batches), measured)
        if measures:
            report()
        if saves:
            lock.check()
            progress.flush()
            checkpoints.save(state, batches.iterator, progress.seconds, measured)
        if preempted:
            raise Preempted(f"preempted at step {step}, which is saved")
    return max(start, config.steps)


def _skipped(batches: Batches) -> dict[str, int]:
    """What the streams of all processes skipped so far; all must call it together."""
    parts = allgather_json(batches.iterator.skipped)
    return count_skipped({number: counts for part in parts for number, counts in part.items()})


def _sampler(config: Config, state: TrainState, tokenizer: Tokenizer, mesh) -> Sampler:
    """The model with its EMA weights; adapters are not merged, but used as in training."""
    params = state.frozen | state.ema
    if config.lora.rank:
        params |= {"lora": lora.scaled(params["lora"], config.lora)}
        config = dataclasses.replace(config, lora=LoraConfig())
    return Sampler(config, params, tokenizer, mesh)


def _check_first_batch(config: Config, tokenizer: Tokenizer, rows: list[int]) -> None:
    """Checks a batch of a separate pipeline: that of the run must start at its first batch."""
    probe = Batches(config, tokenizer, rows)
    expected = contract.spec(config.layout, len(rows), config.data.max_seq_len)
    vocab_size = config.layout.vocab_size
    contract.check(next(probe.iterator), expected, config.max_images, vocab_size)


class _NanGuard:
    """Raises NonFiniteLoss if loss, gradient or parameters are NaN or infinite."""

    def __init__(self, tokenizer: Tokenizer, checkpoints: Checkpoints):
        self._tokenizer, self._checkpoints = tokenizer, checkpoints
        self._pending: tuple[int, TrainMetrics, contract.Batch] | None = None

    def check(self, step: int, metrics: TrainMetrics, batch: contract.Batch) -> None:
        """Checks the previous step and stores this one."""
        self.finish()
        self._pending = (step, metrics, batch)

    def finish(self) -> None:
        if self._pending is None:
            return
        step, metrics, batch = self._pending
        self._pending = None
        values = jax.device_get(metrics).compute()
        bad = [
            name for name in ("loss", "grad_norm", "param_norm") if not np.isfinite(values[name])
        ]
        if bad:
            self._checkpoints.wait()  # the save of the step before this one may not be complete
            last = self._checkpoints.latest
            good = "there is no checkpoint yet" if last is None else f"checkpoint {last} is good"
            raise NonFiniteLoss(
                f"{' and '.join(bad)} not finite at step {step}; {good}; documents of the batch: "
                + "; ".join(_documents(batch, self._tokenizer))
            )


def _documents(batch: contract.Batch, tokenizer: Tokenizer) -> list[str]:
    found = []
    for tokens, token_types, segments in zip(
        batch["tokens"], batch["token_types"], batch["segment_ids"]
    ):
        for number in range(1, segments.max() + 1):
            here = segments == number
            found.append(repr(describe(tokens[here], token_types[here], tokenizer)))
    return found
