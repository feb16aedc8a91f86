"""A folder with a LLaMA or a MonoFormer in it -> the config of a run and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from monoformer_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    SamplingConfig,
)
from monoformer_jax.errors import require
from monoformer_jax.models import monoformer
from monoformer_jax.pretrained import llama
from monoformer_jax.pretrained import monoformer as original
from monoformer_jax.pretrained.folder import open_weights, read_json
from monoformer_jax.pretrained.table import Entry, Tensor, open_tree

SPECIALS = 4  # <PAD>, <image>, <|im_start|> and <|im_end|> follow the vocabulary of a LLaMA
OURS = "monoformer_jax"  # key of config.json for our whole config, in folders that we wrote
_NEW_ROW_STDDEV = 0.02  # what LLaMA's own rows started with


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A folder of weights whose config has been understood, and nothing else read.

    Attributes:
      config: of a run that samples it, or trains on from it.
      table: which tensor is which parameter; for a LLaMA only of the text half.
      tensors: what the folder holds.
      ignored: pattern of names that hold no parameter.
    """

    folder: Path
    config: Config
    table: Sequence[Entry]
    tensors: Mapping[str, Tensor]
    ignored: str
    trained_here: bool = False  # config.json holds the whole config of one of our runs

    def open(self, seed: int = 0) -> dict:
        """A `Tensor` for each parameter, float32 [see models.monoformer.init]; none is read yet.

        A LLaMA lacks the image parts and four rows of the vocabulary: they start fresh.

        Args:
          seed: of what starts fresh.

        Raises:
          InputError: what is missing, unknown or of another shape, all at once.
        """
        c, key = self.config.model, jax.random.key(seed)
        target = jax.eval_shape(lambda: monoformer.init(c, key))
        covered = {entry.path.split("/")[0] for entry in self.table}
        theirs = {name: shape for name, shape in target.items() if name in covered}
        params = open_tree(
            self.table, self.tensors, theirs, ignored=self.ignored, source=str(self.folder)
        )
        parts = [name for name in target if name not in covered]
        if not parts:
            return params
        # Only what is asked for is computed and takes memory.
        fresh = jax.jit(lambda: {k: monoformer.init(c, key)[k] for k in parts})()
        rows = np.random.default_rng(seed).normal(size=(2, SPECIALS, c.embed_dim)) * _NEW_ROW_STDDEV
        new = slice(c.vocab_size - SPECIALS, c.vocab_size)
        params["token_embedding"] = _with(params["token_embedding"], new, rows[0])
        params["text_head"] = _with(params["text_head"], (slice(None), new), rows[1].T)
        return params | jax.tree.map(
            lambda x: Tensor(x.shape, x.dtype, lambda: np.asarray(x)), fresh
        )


def _with(tensor: Tensor, where, values: np.ndarray) -> Tensor:
    """The tensor with these values there."""

    def load():
        whole = tensor.load()
        whole[where] = values
        return whole

    return dataclasses.replace(tensor, load=load)


def open_pretrained(folder: Path) -> Pretrained:
    """Raises InputError: no such folder, no weights, or a model that is not computed here."""
    require(folder.is_dir(), f"{folder} is no folder")
    where = folder / "config.json"
    values, tensors = read_json(where), open_weights(folder)
    if original.is_monoformer(values) and OURS in values:
        config = Config.from_dict(values[OURS])
        table = original.table(config.model)
        return Pretrained(folder, config, table, tensors, original.IGNORED, trained_here=True)
    if original.is_monoformer(values):
        model = original.read_config(values, where, original.feature_dim(tensors))
        length = llama.field(values, "tokenizer_max_length", where)
        side = original.latent_side(values, where)
        table, ignored = original.table(model), original.IGNORED
    else:
        model = llama.read_config(values, where)
        vocab, length = model.vocab_size, values.get("max_position_embeddings", 2048)
        model = dataclasses.replace(model, vocab_size=vocab + SPECIALS)
        side = 32
        table, ignored = llama.table(model, vocab), llama.IGNORED
    return Pretrained(folder, run_config(model, length, side), table, tensors, ignored)


def run_config(model: ModelConfig, length: int, side: int) -> Config:
    """As the original trains and samples.

    Args:
      length: of a row.
      side: of the latents.
    """
    tokens = model.time_tokens + (side // model.patch_size) ** 2
    return Config(
        name="converted",
        model=model,
        objective=ObjectiveConfig(kind="ddpm"),
        loss=LossConfig(text_weight=0.01, text_beside_images=False),
        data=DataConfig(max_seq_len=max(length, tokens + 4), image_size=side),
        sampling=SamplingConfig(solver="ddpm", guidance_channels="first_three"),
    )
