"""Converts between Hugging Face folders and workdirs: the steps of `convert`."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from monoformer_jax.config import Config
from monoformer_jax.data.tokenizer import extend_tokenizer, find_tokenizer, open_tokenizer
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import atomic_folder
from monoformer_jax.models import abstract_params
from monoformer_jax.pretrained import monoformer as original
from monoformer_jax.pretrained.folder import open_weights, write_safetensors
from monoformer_jax.pretrained.model import EXPORTED, format_of, key_table, open_pretrained
from monoformer_jax.pretrained.table import Tensor, by_path, read_tree, same, write_tensors
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.runtime.workdir import absolute_paths, read_config

Progress = Callable[[Sequence], Any]
_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Source:
    folder: Path
    ours: bool  # True for a workdir, False for a Hugging Face folder


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model whose parameters are read one at a time, on demand.

    Attributes:
      params: tree of `Tensor`s, the raw weights; None if the source has only one set of weights.
      ema: tree of `Tensor`s, the EMA weights, or the only set.
      mapped: paths of the parameters that come from the source.
      left_out: source tensors that are not converted: those of the frozen vision encoder.
    """

    config: Config
    params: dict | None
    ema: dict
    mapped: tuple[str, ...]
    source: Source
    left_out: tuple[str, ...] = ()

    @property
    def untrained(self) -> list[str]:
        """Modules that are newly initialised: the image layers of a LLaMA."""
        return sorted(set(self.ema) - {path.split("/")[0] for path in self.mapped})

    @property
    def parts(self) -> dict[str, dict]:
        return {"ema": self.ema} | ({} if self.params is None else {"params": self.params})


def find_source(name: str) -> Source:
    """Finds a local folder, or downloads the model of this name from the Hugging Face hub.

    Raises:
      InputError: neither exists, or huggingface_hub is not installed.
    """
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise InputError(
                f"{name} is not a folder, and downloading it from the hub needs huggingface_hub: "
                "pip install 'monoformer_jax[hub]'"
            ) from error
        try:
            # Many repositories hold the same weights in both formats.
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
        except Exception as error:  # network, hub and disk errors have many types
            raise InputError(f"{name} is not a folder and its download failed ({error})") from error
    require(folder.is_dir(), f"{name} is not a folder")
    return Source(folder, (folder / "checkpoints").is_dir())


def open_source(source: Source, seed: int = 0) -> Weights:
    """Opens the weights of a source; raises InputError if the folder is invalid."""
    if source.ours:
        return _open_workdir(source)
    found = open_pretrained(source.folder)
    params, ema = None, found.open(seed)
    if (source.folder / "ema").is_dir():
        average = dataclasses.replace(found, tensors=open_weights(source.folder / "ema"))
        params, ema = ema, average.open(seed)
    mapped = tuple(entry.path for entry in found.table)
    config = found.config
    if config.data.tokenizer == "bytes" and not found.trained_here:
        data = dataclasses.replace(config.data, tokenizer=_TOKENIZER)
        config = dataclasses.replace(config, data=data)
    left_out = tuple(name for name in found.tensors if re.fullmatch(original.TOWER, name))
    return Weights(config, params, ema, mapped, source, left_out)


def _open_workdir(source: Source) -> Weights:
    config = read_config(source.folder)
    if config.lora.rank:  # adapters are merged into the full model
        config, params, _ = load_trained(source.folder)
        ema = jax.tree.map(lambda x: Tensor(x.shape, x.dtype, lambda: np.asarray(x)), params)
        return Weights(config, None, ema, tuple(by_path(ema)), source)
    shapes = abstract_params(config.model)
    with Checkpoints(source.folder) as checkpoints:
        names, untrained = ["ema", "params"][: 1 + checkpoints.has_params], checkpoints.untrained()
        checkpoints.verify_newest([*names, "meta"])

    def tensor(part, path, leaf):
        def load():
            with Checkpoints(source.folder) as checkpoints:
                return checkpoints.restore_one(part, [key.key for key in path], leaf)

        return Tensor(leaf.shape, np.dtype(np.float32), load)

    parts = {
        name: jax.tree_util.tree_map_with_path(functools.partial(tensor, name), shapes)
        for name in names
    }
    mapped = tuple(path for path in by_path(shapes) if path.split("/")[0] not in untrained)
    return Weights(config, parts.get("params"), parts["ema"], mapped, source)


def write_workdir(to: Path, weights: Weights, progress: Progress = same) -> None:
    """Writes a workdir, for `sample` or for the `init_from` of a new run."""
    with atomic_folder(to) as folder:
        (folder / "config.json").write_text(weights.config.to_json(), encoding="utf-8")
        _write_tokenizer(folder, weights)
        with Checkpoints(folder, kept=1) as checkpoints:
            checkpoints.save_weights(
                {name: functools.partial(read_tree, tree, progress)
                 for name, tree in weights.parts.items()},
                weights.untrained,
            )  # fmt: skip


def check_workdir(to: Path, weights: Weights) -> None:
    """Raises InputError if `to` differs from `weights`; reads one parameter at a time."""
    written = _open_workdir(Source(to, ours=True))
    same_config = written.config == absolute_paths(to, weights.config)
    require(same_config, f"{to} does not have the config of the source")
    for name, tree in weights.parts.items():
        _require_equal(to / name, by_path(written.parts[name]), by_path(tree))


def write_safetensors_folder(
    to: Path, weights: Weights, dtype: str = "float32", progress: Progress = same
) -> None:
    """Writes config.json, model.safetensors, ema/ and the tokenizer in the original's format."""
    c = weights.config
    values = {}
    if form := format_of(c.model):
        values = form.write_config(c.model, c.data.image_size, c.data.max_seq_len)
    values[EXPORTED] = c.to_dict()  # for the settings without a key in the published config.json
    with atomic_folder(to) as folder:
        tokenizer = _write_tokenizer(folder, weights)
        if tokenizer is not None:
            names = ("pad", "image", "im_start", "im_end")
            special = {name: getattr(tokenizer, f"{name}_id") for name in names}
            values |= {"special_tokens": special, "image_token_index": tokenizer.image_id}
            values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        text = json.dumps(values, indent=2) + "\n"
        for part, tensors in _parts(weights, dtype).items():
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "config.json").write_text(text, encoding="utf-8")
            write_safetensors(folder / part / "model.safetensors", tensors, progress)


def check_safetensors(to: Path, weights: Weights, dtype: str = "float32") -> None:
    """Raises InputError if `to` differs from `weights`; reads one tensor at a time."""
    for part, want in _parts(weights, dtype).items():
        got = open_weights(to / part)
        require(got.keys() == want.keys(), f"{to / part} does not have the tensors of the source")
        _require_equal(to / part, got, want)


def _parts(weights: Weights, dtype: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each subfolder: ".", and "ema" if the source has two sets of weights."""
    trees = {".": weights.ema if weights.params is None else weights.params}
    if weights.params is not None:
        trees["ema"] = weights.ema
    table = key_table(weights.config.model)
    kind = np.dtype(jax.numpy.dtype(dtype))
    return {part: write_tensors(table, tree, kind) for part, tree in trees.items()}


def _require_equal(where: Path, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    different = [name for name in want if not np.array_equal(got[name].load(), want[name].load())]
    require(not different, f"{where} differs from the source in {', '.join(different)}")


def _write_tokenizer(folder: Path, weights: Weights):
    """Copies the tokenizer, and for a LLaMA adds the special tokens that it lacks.

    Returns:
      The tokenizer of the new folder, or None if the source has none.
    """
    config, source = weights.config, weights.source
    data, to = config.data, folder / _TOKENIZER
    if data.tokenizer != "bytes":
        file = source.folder / _TOKENIZER
        if source.ours:
            file = find_tokenizer(data.tokenizer, source.folder)
        if not file.is_file():
            return None
        if weights.untrained:  # a LLaMA
            extend_tokenizer(file, to)
        else:
            to.write_bytes(file.read_bytes())
        data = dataclasses.replace(data, tokenizer=str(to.resolve()))
    return open_tokenizer(data, folder, config.layout.vocab_size)
