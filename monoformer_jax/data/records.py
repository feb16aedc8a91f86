"""Training datasets: folders of ArrayRecord files, and the format of a record.

DIR/records-00000-of-00313.array_record   msgpack, one example per record, random access
DIR/info.json                             {"examples", "files", "shape", "bytes"}: [h, w, C] of the
                                          images or null, and {file: its size}

A record is an example: a list of its parts in reading order, each a map of one of these forms.

    {"prompt": ["a cat", "an animal"]}                 wordings of the prompt, see `Prompt`
    {"text": "hello"}                                  text with loss
    {"text": "hi", "train": false}                     text without loss
    {"end_of_turn": true}                              </s>
    {"shape", "mean", "logvar", "denoise"}             a conditioning image, or one to generate
    {"shape", "pixels", "denoise"}                     the same, of pixels

Images are mean and log-variance of a normalized latent, in float16, or pixels in uint8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import grain
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from monoformer_jax.data.documents import EndOfTurn, Image, Part, Prompt, UntrainedText
from monoformer_jax.data.image_io import from_uint8
from monoformer_jax.errors import BadExample, InputError, require
from monoformer_jax.files import atomic_write

Example = Sequence[Part | Prompt]


def pack(example: Example) -> bytes:
    """Serializes an example to the bytes of a record."""
    return msgpack.packb([_pack_part(part) for part in example])


def unpack(record: bytes) -> list[Part | Prompt]:
    """Deserializes a record; images are float32."""
    return [_unpack_part(values) for values in msgpack.unpackb(record)]


def _pack_part(part: Part | Prompt) -> dict:
    if isinstance(part, Prompt):
        return {"prompt": list(part.texts)}
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, UntrainedText):
        return {"text": part.text, "train": False}
    if isinstance(part, EndOfTurn):
        return {"end_of_turn": True}
    if part.pixels.dtype == np.uint8:
        pixels = {"pixels": part.pixels.tobytes()}
        return {"shape": part.pixels.shape, "denoise": part.denoise} | pixels
    arrays = {"mean": part.pixels, "logvar": part.logvar}
    packed = {k: x.astype("<f2").tobytes() for k, x in arrays.items() if x is not None}
    return {"shape": part.pixels.shape, "denoise": part.denoise} | packed


def _unpack_part(values: dict) -> Part | Prompt:
    if "prompt" in values:
        return Prompt(tuple(values["prompt"]))
    if "text" in values:
        return values["text"] if values.get("train", True) else UntrainedText(values["text"])
    if "end_of_turn" in values:
        return EndOfTurn()
    if "pixels" in values:
        pixels = np.frombuffer(values["pixels"], np.uint8).reshape(values["shape"])
        return Image(from_uint8(pixels), values["denoise"])
    arrays = {
        name: np.frombuffer(values[name], "<f2").reshape(values["shape"]).astype(np.float32)
        for name in ("mean", "logvar")
        if name in values
    }
    return Image(arrays["mean"], values["denoise"], arrays.get("logvar"))


def write_file(path: epath.Path, examples: Iterable[Example]) -> None:
    """Writes one file atomically."""
    # One record per group, so that reading one does not decompress its neighbours.
    with atomic_write(path) as staging:
        writer = ArrayRecordWriter(str(staging), "group_size:1")
        try:
            for example in examples:
                writer.write(pack(example))
        finally:
            writer.close()  # after an error too: it would write its file again after the removal


def write_records(folder: epath.PathLike, examples: Iterable[Example]) -> None:
    """Writes a folder of one file, for small datasets that are computed."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "records-00000-of-00001.array_record"
    write_file(file, examples)
    write_info(folder, [file])


def write_info(folder: epath.Path, files: Sequence[epath.Path]) -> int:
    """Marks a folder of these files as complete; returns the number of examples."""
    source = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    shapes = (
        part["shape"]
        for number in range(len(source))
        for part in msgpack.unpackb(source[number])
        if "shape" in part
    )
    info = {
        "examples": len(source),
        "files": len(files),
        "shape": next(shapes, None),  # of the first image: reads all records of text alone
        "bytes": {file.name: file.stat().length for file in files},
    }
    with atomic_write(folder / "info.json") as file:
        file.write_text(json.dumps(info) + "\n", encoding="utf-8")
    return len(source)


def count_records(files: Sequence[epath.Path]) -> int:
    """Number of records in these files."""
    return len(grain.sources.ArrayRecordDataSource([str(file) for file in files]))


class Records(Sequence):
    """Random-access sequence of the examples of a folder.

    Raises:
      InputError: no such folder, `prepare_data` has not finished it, or a file has another size than
        was written. An example that cannot be read raises `BadExample`.
    """

    def __init__(self, folder: str):
        path = epath.Path(folder)
        info = path / "info.json"
        require(info.exists(), f"{folder} has no complete records: there is no info.json; "
                               "`prepare_data` writes such folders")  # fmt: skip
        self.info = json.loads(info.read_text(encoding="utf-8"))
        files = sorted(file for file in path.iterdir() if file.suffix == ".array_record")
        require(
            len(files) == self.info["files"],
            f"{folder} has {len(files)} record files, but {self.info['files']} were written",
        )
        for file in files:  # records of before November 2026 have no sizes
            found, want = file.stat().length, self.info.get("bytes", {}).get(file.name)
            require(
                want in (None, found),
                f"{file} has {found} bytes, but {want} were written: copy it again",
            )
        self._source = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        require(len(self) > 0, f"{folder} holds no examples")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> list[Part | Prompt]:
        try:
            record = self._source[number]
        except Exception as error:  # its bytes are damaged, or the disk fails
            raise BadExample("unreadable", f"the record cannot be read ({error})") from error
        try:
            return unpack(record)
        except UnicodeDecodeError as error:
            raise BadExample("text", f"a text of the record is not UTF-8 ({error})") from error
        except (msgpack.UnpackException, ValueError) as error:
            raise BadExample("unreadable", f"the record is damaged ({error})") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise BadExample("schema", f"the record has another form ({error!r})") from error

    def __repr__(self) -> str:
        return f"Records({len(self)} examples)"


def fingerprint(folder: str) -> str:
    """Hash of info.json and of the names and sizes of the files, to compare folders of two machines."""
    path, digest = epath.Path(folder), hashlib.sha256()
    if not (path / "info.json").exists():
        return "no complete records"
    digest.update((path / "info.json").read_bytes())
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name} {file.stat().length}\n".encode())
    return digest.hexdigest()[:16]


def check_shape(name: str, records: Records, side: int, channels: int) -> None:
    """Raises InputError if the images do not have the size and channels of the config."""
    found, want = records.info["shape"], [side, side, channels]
    if found is not None and found != want:
        found, want = ("×".join(map(str, shape)) for shape in (found, want))
        raise InputError(
            f"data.records.{name} holds images of {found}, but data.image_size={side} and "
            f"model.channels={channels} make {want}"
        )


def check_example(example: Example, side: int, channels: int) -> None:
    """Raises BadExample for an image of another size, NaN or infinity in one, or an empty example."""
    images = [part for part in example if isinstance(part, Image)]
    for image in images:
        if image.pixels.shape != (side, side, channels):
            raise BadExample("size", f"an image is {'×'.join(map(str, image.pixels.shape))}")
        for values in (image.pixels, image.logvar):
            if values is not None and not np.isfinite(values).all():
                raise BadExample("not_finite", "an image holds NaN or infinity")
    texts = [t for p in example for t in getattr(p, "texts", [getattr(p, "text", p)])]
    if not images and not any(isinstance(text, str) and text.strip() for text in texts):
        raise BadExample("empty", "the example has neither text nor an image")
