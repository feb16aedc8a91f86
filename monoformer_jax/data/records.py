"""Datasets as training reads them: folders of ArrayRecord files, and what one record holds.

DIR/records-00000-of-00313.array_record   msgpack, one example each, in reach by its number
DIR/info.json                             {"examples", "files", "shape"}; [h, w, C] of the latents

An example is {"captions": [...]} with an image to paint, or {"messages": [...]} of a conversation,
the first asked and every second one answered, with or without an image to look at. The image is the
mean and the log-variance of a latent, times the autoencoder's scale, in half precision.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

import grain
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from monoformer_jax.data.templates import CHAT_TEMPLATE
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import atomic_write

ASK, ANSWER = CHAT_TEMPLATE


@dataclasses.dataclass(frozen=True)
class Example:
    """One record; `captions` or `messages`, the other one empty."""

    captions: Sequence[str] = ()
    messages: Sequence[str] = ()
    mean: np.ndarray | None = None  # float16 [h, w, C]
    logvar: np.ndarray | None = None

    def pack(self) -> bytes:
        values = {"captions": list(self.captions), "messages": list(self.messages)}
        if self.mean is not None:
            values["shape"] = self.mean.shape
            values |= {k: getattr(self, k).astype("<f2").tobytes() for k in ("mean", "logvar")}
        return msgpack.packb(values)

    @classmethod
    def unpack(cls, record: bytes) -> Example:
        values = msgpack.unpackb(record)
        shape = values.pop("shape", None)
        for name in ("mean", "logvar"):
            if name in values:
                values[name] = np.frombuffer(values[name], "<f2").reshape(shape)
        return cls(**values)


def write_file(path: epath.Path, examples: Iterable[Example]) -> None:
    """Writes one file, which gets its name when it is whole."""
    # One record a group, so that reading one does not decompress its neighbours.
    with atomic_write(path) as staging:
        writer = ArrayRecordWriter(str(staging), "group_size:1")
        for example in examples:
            writer.write(example.pack())
        writer.close()


def count_records(files: Sequence[epath.Path]) -> int:
    return len(grain.sources.ArrayRecordDataSource([str(file) for file in files]))


class Records(Sequence):
    """The examples of a folder, by number.

    Raises:
      InputError: no such folder, or one that `encode_latents` has not finished.
    """

    def __init__(self, folder: str):
        path = epath.Path(folder)
        info = path / "info.json"
        require(info.exists(), f"{folder} holds no finished records: it has no info.json; "
                               "`encode_latents` writes such folders")  # fmt: skip
        self.info = json.loads(info.read_text())
        files = sorted(str(file) for file in path.glob("*.array_record"))
        require(
            len(files) == self.info["files"],
            f"{folder} has {len(files)} files of records, {self.info['files']} were written",
        )
        self._source = grain.sources.ArrayRecordDataSource(files)
        require(len(self) > 0, f"{folder} holds no examples")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Example:
        return Example.unpack(self._source[number])

    def __repr__(self) -> str:
        return f"Records({len(self)} examples)"


def check_shape(name: str, records: Records, side: int) -> None:
    """Raises InputError where a record's images are not of the size that the config says."""
    shape = records.info["shape"]
    if shape is not None and shape[:2] != [side, side]:
        raise InputError(
            f"data.records.{name} holds latents of {shape[0]}×{shape[1]}, but "
            f"data.image_size={side}"
        )
