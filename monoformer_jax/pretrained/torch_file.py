"""Reads pytorch_model.bin without torch: a zip of raw storages and a pickle that refers to them.

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


def open_torch_file(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a state dict saved by torch.save (1.6 or later); values are read on demand.

    A tensor never has more values than its storage, and a storage never more bytes than the file.

    Raises:
      InputError: another format, a damaged file, objects other than tensors, or references to code.
    """
    require(
        zipfile.is_zipfile(path),
        f"{path} is damaged or not a zip archive: if PyTorch before 1.6 saved it, load it and save it "
        "again with a newer PyTorch",
    )
    try:
        archive = zipfile.ZipFile(path)
        (listing,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        _check_archive(path, archive)
        reader = _Unpickler(path, archive, listing.removesuffix("data.pkl"))
        found = reader.load()
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

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str):
        require(
            archive.getinfo(f"{prefix}data.pkl").file_size <= MOST_PICKLE,
            f"{path} is rejected: its pickle has more than {MOST_PICKLE} bytes",
        )
        pickled = archive.read(f"{prefix}data.pkl")
        for opcode, argument, _ in pickletools.genops(pickled):
            # The unpickler makes room for the memo's number at once.
            require(
                "PUT" not in opcode.name or int(argument) <= len(pickled),
                f"{path} is damaged: its pickle numbers more objects than it has bytes",
            )
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._path, self._archive, self._prefix = path, archive, prefix
        order = f"{prefix}byteorder"
        if order in archive.namelist():
            require(archive.read(order) == b"little", f"{path} is big-endian: not supported")
        # New objects for every file, so that a file cannot modify those of the next one.
        self._known = {
            ("collections", "OrderedDict"): type("Dict", (collections.OrderedDict,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *x: _rebuild(path, *x),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return name
        require(
            (module, name) in self._known,
            f"{self._path} is rejected: its pickle refers to {module}.{name}, which is code and not "
            "a tensor; nothing was executed",
        )
        return self._known[module, name]

    def persistent_load(self, identity):
        kind, name, key, _, count = identity
        require(
            kind == "storage" and name in _STORAGES and isinstance(key, str) and _is_size(count),
            f"{self._path} is damaged: it refers to a storage of an unknown type",
        )
        dtype = np.dtype(_STORAGES[name])
        return _Storage(self._archive, f"{self._prefix}data/{key}", dtype, count)


class _Storage:
    """A one-dimensional array in the archive."""

    def __init__(self, archive: zipfile.ZipFile, entry: str, dtype: np.dtype, count: int):
        require(
            entry in archive.NameToInfo
            and archive.getinfo(entry).file_size >= count * dtype.itemsize,
            f"{archive.filename} is damaged: {entry} is missing or too short",
        )
        self.archive, self.entry, self.dtype, self.count = archive, entry, dtype, count

    def read(self) -> np.ndarray:
        try:
            return np.frombuffer(self.archive.read(self.entry), self.dtype, self.count)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"{self.archive.filename} is damaged: {self.entry} cannot be read ({error})"
            ) from error

    def __setstate__(self, state):
        raise InputError(f"{self.archive.filename} is damaged: it changes a storage")


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
