"""The model of a recorded folder, and the configs under which its cases were recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.pretrained.model import open_pretrained
from monoformer_jax.pretrained.table import read_tree

# Recorded variants of a case have the same inputs and another config.
VARIANTS = {
    "_causal": {"bidirectional_images": False},
    "_nopos": {"position_embedding": "none"},
    "_pos_each_layer": {"position_embedding": "every_layer"},
}


def load(folder):
    """MonoFormerConfig in float32, and the parameters, of a MonoFormer or a LLaMA."""
    found = open_pretrained(folder.path)
    model = dataclasses.replace(found.config.model, dtype="float32", remat="none")
    return model, jax.tree.map(jnp.asarray, read_tree(found.open()))


def vary(model, changes):
    """The MonoFormerConfig with these variants of the original."""
    return dataclasses.replace(model, original=dataclasses.replace(model.original, **changes))


def inputs_of(folder, case):
    """The case whose inputs it uses, and what it changes in the config."""
    for suffix, changes in VARIANTS.items():
        if case.endswith(suffix):
            base = case.removesuffix(suffix)
            recorded = folder.cases[case]
            return (recorded if "input_ids" in recorded else folder.cases[base]), changes
    return folder.cases[case], {}


def run_config(folder, model, **groups):
    """The config of the folder, as the original trains and samples, around this model."""
    return dataclasses.replace(open_pretrained(folder.path).config, model=model, **groups)


def first_inputs(folder, total):
    """The training case with this total loss: the inputs of a recorded optimizer trace."""
    (case,) = [
        arrays for arrays in folder.cases.values()
        if {"input_ids", "total"} <= arrays.keys() and np.isclose(arrays["total"], total, 1e-5, 0)
    ]  # fmt: skip
    return case


class IdTokenizer:
    """Tokenizer for texts that are lists of ids: "5 17 3"."""

    def __init__(self, config):
        special = config.get("special_tokens", {})
        self.vocab_size = config["vocab_size"]
        self.bos_id, self.eos_id = config["bos_token_id"], config["eos_token_id"]
        for name in ("pad", "image", "im_start", "im_end"):
            setattr(self, f"{name}_id", special.get(name, -1))

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))
