"""What a run reports: averages over the steps between two reports, to JSON lines and TensorBoard."""

from __future__ import annotations

import json
import time

from clu import metrics
from etils import epath

from monoformer_jax.files import atomic_write

_NAMES = ("loss", "text_loss", "image_loss", "grad_norm", "param_norm", "learning_rate",
          "real_token_share")  # fmt: skip

_REWRITE = 60.0  # seconds between two writings of an object that cannot be appended to

TrainMetrics = metrics.Collection.create(
    **{name: metrics.Average.from_output(name) for name in _NAMES}
)


class Writer:
    """Scalars to `metrics.jsonl`, one object a line, and to TensorBoard where it is installed.

    It has the methods of `clu.metric_writers.MetricWriter` that are needed here; importing clu's own
    takes tensorflow, which this library does not need.

    A local file gets each line at once. Storage such as gs:// cannot append, so the whole object is
    written anew, once a minute and when asked to.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Args:
        workdir: folder of the run.
        step: the step that the run (re)starts after; what an interrupted run reported beyond it
          is going to be reported again, so it is taken out.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._lines: list[str] = []
        if self._path.exists():
            text = self._path.read_text()
            self._lines = [line for line in text.splitlines() if _step(line) <= step]
            self._write()
        self._written = time.monotonic()
        self._file = None if _is_remote(self._path) else self._path.open("a")
        try:
            from tensorboard.summary import Writer as TensorBoard
        except ImportError:
            self._board = None
        else:
            self._board = TensorBoard(str(self._path.parent / "tensorboard"))

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        line = json.dumps({"step": step} | scalars)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written > _REWRITE:
                self.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """What was given so far is stored when this returns; to be called before a checkpoint."""
        if not self._file:
            self._write()
            self._written = time.monotonic()

    def _write(self) -> None:
        with atomic_write(self._path) as file:
            file.write_text("".join(f"{line}\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the kill came in the middle of a line
        return float("inf")
