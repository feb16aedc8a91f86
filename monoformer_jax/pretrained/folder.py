"""Reads weight folders in Hugging Face's layouts, and writes safetensors.

model.safetensors                       or shards, with model.safetensors.index.json
pytorch_model.bin                       or shards, with pytorch_model.bin.index.json
diffusion_pytorch_model.*, weights.*    alternative names; the first is that of diffusers
config.json

A folder has one set of weights: which of two is meant is not guessed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from monoformer_jax import files
from monoformer_jax.errors import InputError, require, whole_number
from monoformer_jax.pretrained.table import Entry, Tensor, open_tree, read_tree, same
from monoformer_jax.pretrained.torch_file import open_torch_file

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "weights")
_INDEX = ".index.json"
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError if the file is missing or is not one."""
    require(path.is_file(), f"{path.parent} has no {path.name}")
    values = files.read_json(path)
    require(isinstance(values, dict), f"{path} is not a JSON object")
    return values


@contextlib.contextmanager
def config_errors(where: Path) -> Iterator[None]:
    """Turns what a config.json with missing keys or values of other types raises into an InputError."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{where} has no {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} has a value of another type than expected ({error})") from error


def size_field(values: Mapping[str, Any], name: str, where: str | Path, most: int = 1 << 20) -> int:
    """A size in a config.json, which is at least 1; absurd ones are refused before anything is made."""
    require(name in values, f"{where} has no {name}")
    return whole_number(values[name], f"{where}: {name}", 1, most)


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of all weights in a folder; values are read on demand.

    Raises:
      InputError: no weights, more than one set of them, a missing or damaged shard, or a .bin that
        contains code.
    """
    require(folder.is_dir(), f"{folder} is not a folder")
    readers = {".safetensors": open_safetensors, ".bin": open_torch_file}
    names = [f"{stem}{end}{index}" for end in readers for stem in _STEMS for index in (_INDEX, "")]
    found = [name for name in names if (folder / name).is_file()]
    require(bool(found), f"{folder} has no weights: no model.safetensors and no pytorch_model.bin")
    if len(found) > 1:  # an index may have been downloaded without its shards
        found = [n for n in found if not n.endswith(_INDEX) or _has_shards(folder / n)] or found
    require(
        len(found) == 1,
        f"{folder} has more than one set of weights, {' and '.join(found)}: keep one of them there",
    )
    file = folder / found[0]
    reader = readers[Path(file.name.removesuffix(_INDEX)).suffix]
    return _open_shards(file, reader) if file.name.endswith(_INDEX) else reader(file)


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    require(isinstance(where, dict), f"{index} has no weight_map")
    # Shards stand beside their index: a path would read other files of this machine.
    outside = [x for x in where.values() if not isinstance(x, str) or not _is_name(x)]
    require(not outside, f"{index} lists a shard that is not the name of a file: {outside[:1]}")
    return where


def _has_shards(index: Path) -> bool:
    return any((index.parent / shard).is_file() for shard in set(_weight_map(index).values()))


def _open_shards(index: Path, reader: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    where = _weight_map(index)
    shards = {name: index.parent / name for name in sorted(set(where.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    require(
        not missing, f"{index.parent} lacks shards listed in {index.name}: {', '.join(missing)}"
    )
    read = {name: reader(path) for name, path in shards.items()}
    lost = [name for name, shard in where.items() if name not in read[shard]]
    require(not lost, f"{index} lists tensors that their shard lacks: {', '.join(lost[:8])}")
    return {name: read[shard][name] for name, shard in where.items()}


def _is_name(shard: str) -> bool:
    return Path(shard).name == shard and shard not in ("", "..") and len(shard) < 256


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file; raises InputError if it is truncated or damaged."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        found = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            view = file.get_slice(name)
            dtype = view.get_dtype()
            require(dtype in _DTYPES, f"{path}: {name} has the unsupported dtype {dtype}")
            load = functools.partial(_load_safetensor, path, name)
            found[name] = Tensor(tuple(view.get_shape()), np.dtype(_DTYPES[dtype]), load)
        return found
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is truncated or damaged ({error})") from error


def _load_safetensor(path: Path, name: str) -> np.ndarray:
    # Reopened for each tensor: pages of a long-lived memory map would accumulate in memory.
    try:
        return safetensors.safe_open(path, framework="numpy").get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error})") from error


def load_folder(
    folder: Path,
    read_config: Callable[[dict[str, Any], Path], Any],
    init: Callable[[Any, jax.Array], Any],
    table: Callable[[Any], Sequence[Entry]],
    ignored: str = "",
) -> tuple[Any, Any]:
    """The config of the model in a folder, and its parameters as float32 arrays.

    Args:
      read_config, table: functions of the model type; see for example `sd_vae`.
      init: (config, key) -> parameters; only their tree and shapes are used.
      ignored: see `table.open_tree`.

    Raises:
      InputError: see `read_json`, `open_weights`, `read_config` and `table.open_tree`.
    """
    require(folder.is_dir(), f"{folder} is not a folder")
    where = folder / "config.json"
    with config_errors(where):
        c = read_config(read_json(where), where)
    target = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    tensors = open_weights(folder)
    return c, read_tree(open_tree(table(c), tensors, target, ignored=ignored, source=str(folder)))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], progress: Callable[[list], Any] = same
) -> None:
    """Writes the tensors one by one, so that only one is in memory at a time.

    Args:
      progress: wraps the list of names to show progress, such as tqdm.
    """
    codes = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # required by transformers' loader
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entry = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in progress(list(tensors)):
            tensor = tensors[name]
            value = tensor.load()
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{name} is {value.dtype}{value.shape}, unlike its description")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
