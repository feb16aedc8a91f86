"""Key tables: map the tensors of a Hugging Face folder to our parameters, in both directions.

A table is a list of entries, one per parameter. A parameter of the scanned layers maps to many
tensors, one per layer. All tensors that are missing, unknown or of the wrong shape are reported in
one error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from monoformer_jax.errors import InputError

_SHOWN = 8  # maximum number of tensors of each kind listed in an error
# Prefixes that torch.compile, DataParallel and training frameworks add to every name.
_WRAPPERS = ("_orig_mod.", "module.", "model.")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array with known shape and dtype, whose values are read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]  # reads the values, without caching


def same(x):
    return x


def transpose(x):
    """PyTorch's Linear is [out, in]; ours is [in, out]."""
    return x.T


@dataclasses.dataclass(frozen=True)
class Entry:
    """The mapping of one parameter.

    Attributes:
      path: path of our parameter, such as "decoder/layers/mlp/up".
      name: name of the tensor; "{}" stands for the layer number: one tensor per layer, stacked on the
        first axis of our parameter.
      read: tensor of one layer -> our layout.
      write: the inverse of `read`; it must also work on abstract arrays.
      alias: alternative name of the tensor in older files.
    """

    path: str
    name: str
    read: Callable[[Any], Any] = same
    write: Callable[[Any], Any] = same
    alias: str | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def by_path(tree: Any) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def open_tree(
    table: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    target: Any,
    *,
    ignored: str = "",
    source: str = "the folder",
) -> Any:
    """The tree of `target` with a float32 `Tensor` for each parameter; no values are read yet.

    Args:
      table: an entry for every leaf of `target`.
      tensors: name -> tensor of the folder, see `folder.open_weights`.
      target: tree of arrays or ShapeDtypeStructs.
      ignored: pattern of tensor names that are not parameters, such as buffers of older versions.
      source: name of the folder in the error.

    Raises:
      InputError: lists all tensors that are missing, unknown or of the wrong shape.
    """
    shapes = by_path(target)
    entries = {entry.path: entry for entry in table}
    if entries.keys() != shapes.keys():  # a bug in the table, not bad input
        raise ValueError(f"table and parameters differ: {sorted(entries.keys() ^ shapes.keys())}")
    plan, used, expected = {}, set(), set()
    missing, misshapen = [], []
    for path, leaf in shapes.items():
        found = [_find(tensors, name, alias) for name, alias in _names(entries[path], leaf)]
        want = _their_shape(entries[path], leaf)
        for (name, _), tensor in zip(_names(entries[path], leaf), found):
            expected.add(name)
            if tensor is None:
                missing.append(f"missing {name} {list(want)} (parameter {path})")
            else:
                used.add(tensor)
                if tensors[tensor].shape != want:
                    got = list(tensors[tensor].shape)
                    misshapen.append(f"{tensor} is {got}, expected {list(want)} (parameter {path})")
        plan[path] = found
    unexpected = [
        n for n in tensors if n not in used and not (ignored and re.fullmatch(ignored, n))
    ]
    unknown = [f"unknown {name} {list(tensors[name].shape)}" for name in unexpected]
    if missing or misshapen or unknown:
        raise InputError(
            f"{source} does not match the model: {len(missing) + len(misshapen) + len(unknown)} "
            f"tensors are missing, unknown or of the wrong shape{_wrapper(unexpected, expected)}"
            f"{_listed(missing)}{_listed(misshapen)}{_listed(unknown)}"
        )
    opened = []
    for path, leaf in shapes.items():
        load = functools.partial(_read, entries[path], [tensors[n] for n in plan[path]], leaf.shape)
        opened.append(Tensor(leaf.shape, np.dtype(np.float32), load))
    return jax.tree.unflatten(jax.tree.structure(target), opened)


def _wrapper(names: Sequence[str], expected: set[str]) -> str:
    """What to do if all names have a prefix without which they would be known; else ""."""
    prefix = ""
    while names and not any(name.removeprefix(prefix) in expected for name in names):
        more = [w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not more:
            return ""
        prefix += more[0]
    if not prefix:
        return ""
    return (
        f"; every name begins with {prefix!r}, as in a checkpoint of a wrapped PyTorch model: remove "
        "this prefix from the names"
    )


def _listed(problems: Sequence[str]) -> str:
    more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*problems[:_SHOWN], *more])


def read_tree(tree: Any, progress: Callable[[Sequence], Any] = same) -> Any:
    """Reads the values of a tree of tensors, such as `open_tree` returns, one by one.

    Args:
      progress: wraps the list of tensors to show progress, such as tqdm.

    Raises:
      InputError: a tensor that cannot be read.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf.load() for leaf in progress(leaves)])


def write_tensors(table: Sequence[Entry], params: Any, dtype: np.dtype) -> dict[str, Tensor]:
    """Tensor name -> tensor, computed on demand from our parameters.

    Args:
      params: tree of arrays, of abstract arrays (for names and shapes alone), or of `Tensor`s; each
        of these is read once if the result is read in order.
    """
    leaves = by_path(params)
    tensors = {}
    for entry in table:
        leaf = leaves[entry.path]
        shape = _their_shape(entry, leaf)
        for number, (name, _) in enumerate(_names(entry, leaf)):
            index = number if entry.stacked else ...
            load = functools.partial(_written, entry, leaf, index, dtype)
            tensors[name] = Tensor(shape, np.dtype(dtype), load)
    return tensors


def _written(entry: Entry, leaf, index, dtype) -> np.ndarray:
    value = _load(leaf.load) if isinstance(leaf, Tensor) else leaf
    return np.asarray(entry.write(np.asarray(value[index]))).astype(dtype)


@functools.lru_cache(maxsize=1)
def _load(load: Callable[[], np.ndarray]) -> np.ndarray:
    """Caches one stack, whose layers are requested one after the other."""
    return load()


def _names(entry: Entry, leaf) -> list[tuple[str, str | None]]:
    """(name, alias) of each tensor of a parameter."""
    if not entry.stacked:
        return [(entry.name, entry.alias)]
    alias = entry.alias
    return [(entry.name.format(i), alias and alias.format(i)) for i in range(leaf.shape[0])]


def _find(tensors: Mapping[str, Tensor], name: str, alias: str | None) -> str | None:
    return next((n for n in (name, alias) if n in tensors), None)


def _their_shape(entry: Entry, leaf) -> tuple[int, ...]:
    shape = leaf.shape[1:] if entry.stacked else leaf.shape
    return jax.eval_shape(entry.write, jax.ShapeDtypeStruct(shape, np.float32)).shape


def _read(entry: Entry, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    # jax copies a numpy array on the CPU unless it is aligned to 64 bytes.
    memory = np.empty(4 * math.prod(shape) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    value = memory[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    for index, tensor in enumerate(tensors):
        value[index if entry.stacked else ...] = entry.read(tensor.load())
    return value
