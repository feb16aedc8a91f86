"""Reads what torch.save wrote, without torch: raw storages, and a pickle that refers to them.

    zip, since torch 1.6   data.pkl, and an entry for each storage
    before                 three pickles that say how, the state, the keys of the storages, the storages

A pickle can run arbitrary code. This reader allows only the few functions that rebuild tensors; a
file that refers to anything else is rejected before that is imported.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from monoformer_jax.errors import InputError, require
from monoformer_jax.pretrained.table import Tensor

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


MOST_PICKLE = 1 << 26  # bytes; that of a large model has less than one million


_OLD_FORMAT = (0x1950A86A20F9469CFC6C, 1001)  # what the first two pickles of an old file are
_OLD_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46"  # its first bytes


def open_torch_file(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a state dict saved by torch.save; values are read on demand.

    A tensor never has more values than its storage, and a storage never more bytes than the file.

    Raises:
      InputError: another format, a damaged file, objects other than tensors, or references to code.
    """
    with open(path, "rb") as file:
        is_old = file.read(len(_OLD_START)) == _OLD_START
    try:
        require(
            is_old or zipfile.is_zipfile(path), f"{path} is damaged, or torch.save did not write it"
        )
        found = _read_old(path) if is_old else _read_zip(path)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise errors of any type
        raise InputError(
            f"{path} is damaged and cannot be read ({type(error).__name__}: {error})"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    require(
        isinstance(found, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()),
        f"{path} is not a dict of tensors",
    )
    return dict(found)


def _read_zip(path: Path):
    archive = zipfile.ZipFile(path)
    (listing,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    _check_archive(path, archive)
    prefix, sizes = listing.removesuffix("data.pkl"), archive.NameToInfo
    require(
        sizes[listing].file_size <= MOST_PICKLE,
        f"{path} is rejected: its pickle has more than {MOST_PICKLE} bytes",
    )
    if (order := f"{prefix}byteorder") in sizes:
        require(archive.read(order) == b"little", f"{path} is big-endian: not supported")

    def open_storage(key: str, dtype: np.dtype, count: int) -> _Storage:
        entry = f"{prefix}data/{key}"
        require(
            entry in sizes and sizes[entry].file_size >= count * dtype.itemsize,
            f"{path} is damaged: {entry} is missing or too short",
        )
        return _Storage(path, entry, dtype, count, lambda: archive.read(entry))

    return _Unpickler(path, archive.read(listing), open_storage).load()


def _read_old(path: Path):
    """The state in a file of torch before 1.6; a storage is its length, int64, and its values."""
    opened: dict[str, _Storage] = {}
    places: dict[str, int] = {}

    def open_storage(key: str, dtype: np.dtype, count: int) -> _Storage:
        if key not in opened:
            size = count * dtype.itemsize
            opened[key] = _Storage(
                path, key, dtype, count, lambda: _read_at(path, places[key], size)
            )
        require(opened[key].count == count, f"{path} is damaged: storage {key} has two sizes")
        return opened[key]

    with open(path, "rb") as file:
        magic, version, system = (_Unpickler(path, _pickle_of(path, file)).load() for _ in range(3))
        require((magic, version) == _OLD_FORMAT, f"{path} has an unknown format")
        require(system["little_endian"] is True, f"{path} is big-endian: not supported")
        state = _Unpickler(path, _pickle_of(path, file), open_storage).load()
        keys, size = _Unpickler(path, _pickle_of(path, file)).load(), path.stat().st_size
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            places[key] = file.tell()
            end = places[key] + count * opened[key].dtype.itemsize
            require(
                count == opened[key].count and end <= size, f"{path} is damaged: it is too short"
            )
            file.seek(end)
    require(places.keys() == opened.keys(), f"{path} is damaged: it lacks storages")
    return state


def _pickle_of(path: Path, file) -> bytes:
    """The next pickle of a file."""
    start = file.tell()
    for _ in pickletools.genops(file):
        require(file.tell() - start <= MOST_PICKLE, f"{path} is rejected: its pickle is too long")
    size = file.tell() - start
    file.seek(start)
    return file.read(size)


def _read_at(path: Path, place: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(place)
        return file.read(size)


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises InputError for what torch.save never writes: entries that expand to more than the file."""
    size = path.stat().st_size
    for entry in archive.infolist():
        stored = (
            entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        )
        require(
            stored and entry.header_offset + entry.file_size <= size,
            f"{path} is rejected: {entry.filename} is compressed, or larger than the file",
        )


class _Unpickler(pickle.Unpickler):
    """Allows the functions that rebuild tensors, and rejects all others without importing them."""

    def __init__(self, path: Path, pickled: bytes, open_storage: Callable | None = None):
        for opcode, argument, _ in pickletools.genops(pickled):
            # The unpickler makes room for the memo's number at once.
            require(
                "PUT" not in opcode.name or int(argument) <= len(pickled),
                f"{path} is damaged: its pickle numbers more objects than it has bytes",
            )
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._path, self._open = path, open_storage
        # New objects for every file, so that a file cannot modify those of the next one.
        self._known = {
            ("collections", "OrderedDict"): type("Dict", (collections.OrderedDict,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *x: _rebuild(path, *x),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return name
        named = ascii(f"{module}.{name}")[1:-1]
        require(
            (module, name) in self._known,
            f"{self._path} is rejected: its pickle refers to {named}, which is code and not a tensor; "
            "nothing was executed",
        )
        return self._known[module, name]

    def persistent_load(self, identity):
        kind, name, key, _, count, *view = identity
        require(
            kind == "storage" and name in _STORAGES and isinstance(key, str) and _is_size(count)
            and self._open is not None and view in ([], [None]),
            f"{self._path} is damaged: it refers to a storage of an unknown type",
        )  # fmt: skip
        return self._open(key, np.dtype(_STORAGES[name]), count)


class _Storage:
    """A one-dimensional array in the file."""

    def __init__(self, path: Path, name: str, dtype: np.dtype, count: int, load: Callable):
        self.path, self.name, self.dtype, self.count, self._load = path, name, dtype, count, load

    def read(self) -> np.ndarray:
        try:
            return np.frombuffer(self._load(), self.dtype, self.count)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is damaged: {self.name} cannot be read ({error})"
            ) from error

    def __setstate__(self, state):
        raise InputError(f"{self.path} is damaged: it changes a storage")


class _TorchTensor(Tensor):
    """A tensor that the pickle cannot change once it is checked."""

    def __setstate__(self, state):
        raise InputError("the file is damaged: it changes a tensor")


def _is_size(value) -> bool:
    return isinstance(value, int) and 0 <= value < 2**48


def _rebuild(path, storage, offset, shape, strides, *_) -> Tensor:
    """A strided view of a storage, copied when it is read."""
    require(
        isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= 32
        and all(map(_is_size, (offset, *shape, *strides))),
        f"{path} is damaged: a tensor reaches outside its storage, or has no shape",
    )
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    values = math.prod(shape)
    # A stride of 0 repeats values: with it, a small file could ask for any amount of memory.
    require(
        values == 0 or (last < storage.count and values <= storage.count),
        f"{path} is damaged: a tensor of shape {shape} reaches outside its storage",
    )

    def load() -> np.ndarray:
        steps = [stride * storage.dtype.itemsize for stride in strides]
        flat = storage.read()[offset:]
        return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()

    return _TorchTensor(shape, storage.dtype, load)
