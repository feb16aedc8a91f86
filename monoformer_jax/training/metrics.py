"""What a run reports: averages over the steps between two reports, to JSON lines and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from clu import metrics

_NAMES = ("loss", "text_loss", "image_loss", "grad_norm", "param_norm", "learning_rate",
          "real_token_share")  # fmt: skip

TrainMetrics = metrics.Collection.create(
    **{name: metrics.Average.from_output(name) for name in _NAMES}
)


class Writer:
    """Scalars to `metrics.jsonl`, one object a line, and to TensorBoard where it is installed.

    It has the methods of `clu.metric_writers.MetricWriter` that are needed here; importing clu's own
    takes tensorflow, which this library does not need.
    """

    def __init__(self, workdir: Path, step: int):
        """Args:
        workdir: folder of the run.
        step: the step that the run (re)starts after; what an interrupted run reported beyond it
          is going to be reported again, so it is taken out.
        """
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        try:
            from tensorboard.summary import Writer as TensorBoard
        except ImportError:
            self._board = None
        else:
            self._board = TensorBoard(str(workdir / "tensorboard"))

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the kill came in the middle of a line
        return float("inf")
