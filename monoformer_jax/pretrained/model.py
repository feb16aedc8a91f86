"""Reads a LLaMA or MonoFormer folder as the config of a run and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from monoformer_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ObjectiveConfig,
    SamplingConfig,
)
from monoformer_jax.errors import require
from monoformer_jax.models import abstract_params, get_model, make_config, trainable
from monoformer_jax.pretrained import llama
from monoformer_jax.pretrained import monoformer as original
from monoformer_jax.pretrained.folder import config_errors, open_weights, read_json, size_field
from monoformer_jax.pretrained.table import Entry, Tensor, by_path, open_tree
from monoformer_jax.runtime.workdir import EXPORTED

SPECIALS = 4  # <PAD>, <image>, <|im_start|> and <|im_end|>, appended to the vocabulary of a LLaMA
_NEW_ROW_STDDEV = 0.02  # LLaMA's initializer_range

# model.kind -> module with the key table and config.json of its published weights. A model without one
# is written under its own parameter names.
FORMATS: dict[str, ModuleType] = {"monoformer": original}


def format_of(c: Any) -> ModuleType | None:
    """The entry of `FORMATS` of a model's config; None without one, and for a U-Net patch codec."""
    return FORMATS.get(c.kind) if getattr(c, "patch_codec", "linear") == "linear" else None


def key_table(c: Any) -> list[Entry]:
    """An entry for every parameter of a model.

    Args:
      c: config of the model.
    """
    if form := format_of(c):
        return form.table(c)
    return [Entry(path, path.replace("/", ".")) for path in by_path(abstract_params(c))]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A folder of weights, of which only config.json and the tensor shapes have been read.

    Attributes:
      config: config of a run that samples from the model or continues its training.
      table: entries of the parameters that the folder has; for a LLaMA only the text layers.
      tensors: name -> tensor of the folder.
      ignored: pattern of tensor names that are not parameters.
    """

    folder: Path
    config: Config
    table: Sequence[Entry]
    tensors: Mapping[str, Tensor]
    ignored: str
    trained_here: bool = False  # config.json has the full Config of a run under EXPORTED

    def open(self, seed: int = 0) -> dict:
        """A float32 `Tensor` for each parameter [see `init` of the model]; none is read yet.

        The image layers and four vocabulary rows that a LLaMA lacks are newly initialised.

        Args:
          seed: seed of the newly initialised parameters.

        Raises:
          InputError: lists all tensors that are missing, unknown or of the wrong shape.
        """
        c, key = self.config.model, jax.random.key(seed)
        target = abstract_params(c)
        covered = {entry.path.split("/")[0] for entry in self.table}
        theirs = {name: shape for name, shape in target.items() if name in covered}
        params = open_tree(
            self.table, self.tensors, theirs, ignored=self.ignored, source=str(self.folder)
        )
        parts = [name for name in target if name not in covered]
        if not parts:
            return params
        # jit eliminates the parameters that are not returned, which saves time and memory.
        fresh = jax.jit(lambda: {k: get_model(c).init(c, key)[k] for k in parts})()
        rows = np.random.default_rng(seed).normal(size=(2, SPECIALS, c.embed_dim)) * _NEW_ROW_STDDEV
        new = slice(c.vocab_size - SPECIALS, c.vocab_size)
        params["token_embedding"] = _with(params["token_embedding"], new, rows[0])
        params["text_head"] = _with(params["text_head"], (slice(None), new), rows[1].T)
        return params | jax.tree.map(
            lambda x: Tensor(x.shape, x.dtype, lambda: np.asarray(x)), fresh
        )


def _with(tensor: Tensor, where, values: np.ndarray) -> Tensor:
    """The tensor with `values` assigned at the index `where`."""

    def load():
        whole = tensor.load()
        whole[where] = values
        return whole

    return dataclasses.replace(tensor, load=load)


def open_pretrained(folder: Path) -> Pretrained:
    """Opens a folder; raises InputError if it has no weights or an unsupported model."""
    require(folder.is_dir(), f"{folder} is not a folder")
    where = folder / "config.json"
    values, tensors = read_json(where), open_weights(folder)
    with config_errors(where):
        return _open_config(folder, where, values, tensors)


def _open_config(
    folder: Path, where: Path, values: dict[str, Any], tensors: Mapping[str, Tensor]
) -> Pretrained:
    if EXPORTED in values:
        require(isinstance(values[EXPORTED], dict), f"{where}: {EXPORTED} is not a JSON object")
        config = make_config(values[EXPORTED])
        table = key_table(config.model)
        return Pretrained(folder, config, table, tensors, original.IGNORED, trained_here=True)
    if original.is_monoformer(values):
        model = original.read_config(values, where, original.feature_dim(tensors))
        length = size_field(values, "tokenizer_max_length", where, 1 << 28)
        table, ignored = original.table(model), original.IGNORED
        config = run_config(model, length, original.latent_side(values, where))
    else:
        model = llama.read_config(values, where)
        vocab = model.vocab_size
        length = size_field(
            {"max_position_embeddings": 2048} | values, "max_position_embeddings", where, 1 << 28
        )
        model = dataclasses.replace(model, vocab_size=vocab + SPECIALS)
        table, ignored = llama.table(model, vocab), llama.IGNORED
        config = Config(model, name="converted", data=_data_config(model, length, side=32))
    return Pretrained(folder, config, table, tensors, ignored)


def load_exported(folder: Path, dtype: str, mesh: Mesh) -> dict:
    """The parameters of a model that `convert` wrote as safetensors, placed by the rules table.

    Raises:
      InputError: a folder of another program, or see `open_pretrained` and `Pretrained.open`.
    """
    found = open_pretrained(folder)
    require(
        found.trained_here,
        f"{folder} was not written by `convert`: python -m monoformer_jax.convert --from={folder} "
        "--to=DIR makes a workdir of it",
    )
    target = trainable.abstract(found.config.model, found.config.lora, mesh)

    def place(tensor: Tensor, to: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(np.asarray(tensor.load(), jax.numpy.dtype(dtype)), to.sharding)

    return jax.tree.map(place, found.open(), target)


def run_config(model: Any, length: int, side: int) -> Config:
    """The config of a MonoFormer, with the original's training and sampling settings.

    Args:
      model: config of the model.
      length: tokens per sequence.
      side: height and width of the latents.
    """
    return Config(
        name="converted",
        model=model,
        objective=ObjectiveConfig(kind="ddpm", learn_sigma=model.predict_variance),
        loss=LossConfig(text_weight=0.01, text_beside_images=False),
        data=_data_config(model, length, side),
        sampling=SamplingConfig(solver="ddpm", guidance_channels="first_three"),
    )


def _data_config(model: Any, length: int, side: int) -> DataConfig:
    tokens = model.layout.image_tokens(side, side)
    return DataConfig(max_seq_len=max(length, tokens + 4), image_size=side, end_of_prompt=False)
