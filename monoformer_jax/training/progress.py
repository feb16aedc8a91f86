"""What a run says while it trains: one line of metrics per report, and how fast it is."""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from monoformer_jax.batch import Batch
from monoformer_jax.training.metrics import TrainMetrics, Writer


class Progress:
    """Writes metrics averaged between reports; shows a progress bar on a terminal, else lines.

    Besides the averages a report has `step_ms`, `tokens_per_s` (padding included) and `images_per_s` of
    the whole run, without the first step, which compiles, and without validations; `data_wait_share`,
    the time spent waiting for a batch after the step before it had ended; and `memory_gib`, the peak of
    the first device, or of the process on a CPU.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        step: int,
        steps: int,
        every: int,
        seconds: float,
        share: float,
    ):
        """Args:
        workdir: folder of the run.
        step: the step after which the run starts or resumes.
        steps: the last step.
        every: steps between reports.
        seconds: seconds trained before this start.
        share: share of the global batch's rows that this process holds.
        """
        self._steps, self._every, self._share = steps, every, share
        self._before, self._started = seconds, time.monotonic()
        self._window: list[TrainMetrics] = []
        self._compiled = False
        self._reset()
        self._is_first = jax.process_index() == 0
        if self._is_first:
            self.writer = Writer(workdir, step or -1)
            self._bar = tqdm(initial=step, total=steps, unit="step", disable=None)

    def _reset(self) -> None:
        self._begin, self._timed = time.monotonic(), 0
        self._waited, self._tokens, self._images = 0.0, 0, 0

    @property
    def seconds(self) -> float:
        """Time spent in training, including compilation, over all starts of the run."""
        return self._before + time.monotonic() - self._started

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    def take(self, batches: Iterator[Batch], running: TrainMetrics | None) -> Batch:
        """Takes the next batch; `running` are the metrics of the step that is under way."""
        asked = time.monotonic()
        batch = next(batches)
        if running is None or all(x.is_ready() for x in jax.tree.leaves(running)):
            self._waited += time.monotonic() - asked
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is not that of the steps."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin

    def add(self, metrics: TrainMetrics, batch: Batch) -> None:
        """Adds a step to the next report."""
        if not self._is_first:
            return
        self._bar.update()
        self._window.append(metrics)
        self._timed += 1
        self._tokens += batch["tokens"].size
        self._images += int(batch["image_ids"].max(-1).sum())
        if not self._compiled:
            jax.block_until_ready(metrics)
            self._reset()
            self._compiled = True

    def report(self, step: int, skipped: Mapping[str, int], measured: Mapping[str, float]) -> None:
        """Reports on the steps since the last report.

        Args:
          skipped: number of examples that were skipped so far, by reason.
          measured: further values of this step, see `evaluation.validation.Validation`.
        """
        if not self._is_first:
            return
        averages = functools.reduce(TrainMetrics.merge, jax.device_get(self._window)).compute()
        self._window = []
        scalars = {name: float(value) for name, value in averages.items()}
        scalars |= self._speed() | _counts(skipped) | {"train_seconds": self.seconds}
        self.writer.write_scalars(step, scalars | dict(measured))
        self.log(self._line(step, scalars))
        self._reset()

    def _speed(self) -> dict[str, float]:
        found = {"memory_gib": peak_memory() / 2**30}
        if self._timed:
            seconds = time.monotonic() - self._begin
            found |= {
                "step_ms": 1e3 * seconds / self._timed,
                "tokens_per_s": self._tokens / self._share / seconds,
                "images_per_s": self._images / self._share / seconds,
                "data_wait_share": min(self._waited / seconds, 1.0),
            }
        return found

    def _line(self, step: int, x: Mapping[str, float]) -> str:
        speed = "  first step, compiled"
        if "step_ms" in x:
            speed = (
                f"  {x['step_ms']:.0f} ms/step  {x['tokens_per_s']:,.0f} tokens/s  "
                f"{x['images_per_s']:,.1f} images/s  data wait {x['data_wait_share']:.0%}"
            )
        left = (self._steps - step) * x.get("step_ms", 0) / 1e3
        line = (
            f"step {step}/{self._steps}  loss {x['loss']:.4f}  text {x['text_loss']:.4f}  "
            f"image {x['image_loss']:.4f}  lr {x['learning_rate']:.2e}  "
            f"real tokens {x['real_token_share']:.1%}{speed}  {x['memory_gib']:.1f} GiB  "
            f"{self.seconds:.0f} s" + (f", {_duration(left)} left" if left else "")
        )
        for name in ("dropped", "cut"):
            if x[f"{name}_documents"]:
                line += f"  documents {name} as too long: {x[f'{name}_documents']}"
        if x["skipped_examples"]:
            line += f"  examples skipped: {x['skipped_examples']}"
        return line

    def write(
        self,
        step: int,
        scalars: Mapping[str, float] | None = None,
        images: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Writes values besides the reports; pictures (PIL) and texts go to TensorBoard alone."""
        if not self._is_first:
            return
        if scalars:
            self.writer.write_scalars(step, scalars)
        self.writer.write_images(step, images or {})
        self.writer.write_texts(step, texts or {})

    def flush(self) -> None:
        if self._is_first:
            self.writer.flush()

    def log(self, text: str) -> None:
        if self._is_first:
            tqdm.write(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._is_first:
            self._bar.close()
            self.writer.close()


def _counts(skipped: Mapping[str, int]) -> dict[str, int]:
    """What was skipped, by the names in metrics.jsonl."""
    others = {f"skipped_{r}": n for r, n in skipped.items() if r not in ("too_long", "cut")}
    totals = {
        "dropped_documents": skipped.get("too_long", 0),
        "cut_documents": skipped.get("cut", 0),
        "skipped_examples": sum(others.values()),
    }
    return totals | others


def peak_memory() -> float:
    """Bytes in use at the peak on the first device; on a CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # In kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    minutes = int(np.ceil(seconds / 60))
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
