"""Training metrics: averages over the steps between reports, as JSON lines and in TensorBoard.

Keys of a line of metrics.jsonl, besides the averages of `TrainMetrics`: see `progress.Progress` and
`evaluation.validation.Validation`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping

import PIL.Image
from clu import metrics
from etils import epath

from monoformer_jax.files import atomic_write

_NAMES = ("loss", "text_loss", "image_loss", "grad_norm", "param_norm", "learning_rate",
          "real_token_share")  # fmt: skip

_REWRITE = 60.0  # seconds between rewrites of a file that cannot be appended to

TrainMetrics = metrics.Collection.create(
    **{name: metrics.Average.from_output(name) for name in _NAMES}
)


class Writer:
    """Writes scalars to `metrics.jsonl`, one object per line, and to TensorBoard if it is installed.

    It has the methods of `clu.metric_writers.MetricWriter` that this library needs; clu's own writers
    import tensorflow, which this library does not need.

    A local file gets each line at once. Storage such as gs:// cannot append, so the complete file is
    rewritten, at most once per minute and in `flush`.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Opens the file of a run.

        Args:
          workdir: folder of the run.
          step: the last step that is not reported again, -1 for a new run; lines of later steps, from
            an interrupted run, are deleted.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._lines: list[str] = []
        if self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True)
            steps = [step_of(line) for line in lines]
            self._keep_damaged([line for line, at in zip(lines[:-1], steps) if at is None])
            self._lines = [
                line.decode().strip()
                for line, at in zip(lines, steps)
                if at is not None and at <= step
            ]
            self._write()
        self._written = time.monotonic()
        self._file = None if _is_remote(self._path) else self._path.open("a", encoding="utf-8")
        self._board = None
        with self._optional(), contextlib.suppress(ImportError):
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._board = EventFileWriter(str(self._path.parent / "tensorboard"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **scalars})
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written > _REWRITE:
                self.flush()
        self._add_to_board(step, [{"tag": k, "simple_value": v} for k, v in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, PIL.Image.Image]) -> None:
        """Writes pictures to TensorBoard."""
        values = []
        for name, picture in images.items():
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "PNG")
            image = {"width": picture.width, "height": picture.height, "colorspace": 3,
                     "encoded_image_string": buffer.getvalue()}  # fmt: skip
            values.append({"tag": name, "image": image})
        self._add_to_board(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown to TensorBoard."""
        values = []
        for name, text in texts.items():
            tensor = {"dtype": "DT_STRING", "string_val": [text.encode()],
                      "tensor_shape": {"dim": [{"size": 1}]}}  # fmt: skip
            metadata = {"plugin_data": {"plugin_name": "text"}}
            values.append(dict(tag=name, metadata=metadata, tensor=tensor))
        self._add_to_board(step, values)

    def _add_to_board(self, step: int, values: list[dict]) -> None:
        if self._board is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        with self._optional():
            event = Event(wall_time=time.time(), step=step, summary={"value": values})
            self._board.add_event(event)

    def flush(self) -> None:
        """Stores all scalars written so far; call it before saving a checkpoint."""
        if not self._file:
            self._write()
            self._written = time.monotonic()

    def _write(self) -> None:
        with atomic_write(self._path) as file:
            file.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
        if self._board:
            with self._optional():
                self._board.close()

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """A run continues without TensorBoard's files: metrics.jsonl has the same values."""
        try:
            yield
        except OSError as error:
            self._board = None
            print(f"WARNING: TensorBoard's files are no longer written ({error})", file=sys.stderr)

    def _keep_damaged(self, lines: list[bytes]) -> None:
        """Sets unreadable lines aside, other than a last one, which is cut off by a killed process."""
        if not lines:
            return
        damaged = self._path.parent / "damaged" / f"metrics.{time.time_ns()}.jsonl"
        damaged.parent.mkdir(exist_ok=True)
        damaged.write_bytes(b"".join(lines))
        print(
            f"WARNING: {len(lines)} lines of {self._path} are damaged and were moved to {damaged}",
            file=sys.stderr,
        )


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def step_of(line: bytes) -> int | None:
    """Step of a line of metrics.jsonl; None if the line is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, LookupError):
        return None
