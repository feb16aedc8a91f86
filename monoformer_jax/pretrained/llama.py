"""Key table and config.json of LLaMA models in Hugging Face format, such as TinyLlama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monoformer_jax.errors import require
from monoformer_jax.models import MODELS
from monoformer_jax.pretrained.folder import size_field
from monoformer_jax.pretrained.table import Entry, transpose

MonoFormerConfig = MODELS["monoformer"].Config  # of the model that the weights become
# Buffers that older transformers versions saved with the parameters.
IGNORED = r".*rotary_emb\.inv_freq"


def read_config(values: dict[str, Any], where: str | Path = "config.json") -> MonoFormerConfig:
    """The model config of a LLaMA; its image layers, which are new, have MonoFormer's sizes.

    Raises:
      InputError: another model type, or an unsupported variant.
    """
    kind = values.get("model_type")
    require(kind == "llama", f"{where}: model_type {kind!r} is not llama")
    supported = {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False,
                 "mlp_bias": False, "tie_word_embeddings": False}  # fmt: skip
    for name, value in supported.items():
        got = values.get(name, value)
        require(got == value, f"{where}: {name}={got!r} is not supported, only {value!r}")
    # transformers 5 moves both RoPE keys into `rope_parameters`.
    rope = {"rope_theta": values.get("rope_theta", 10_000.0)} | (
        values.get("rope_parameters") or {}
    )
    rope_type = rope.get("rope_type", "default")
    require(
        rope_type == "default",
        f"{where}: rope_parameters of type {rope_type!r} are not supported, only 'default'",
    )
    heads, width = (
        size_field(values, name, where) for name in ("num_attention_heads", "hidden_size")
    )
    optional = {name: values.get(name) or size for name, size in
                (("num_key_value_heads", heads), ("head_dim", width // heads))}  # fmt: skip
    return MonoFormerConfig(
        vocab_size=size_field(values, "vocab_size", where, 1 << 24),
        num_layers=size_field(values, "num_hidden_layers", where, 1000),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=size_field(optional, "num_key_value_heads", where),
        head_dim=size_field(optional, "head_dim", where),
        mlp_dim=size_field(values, "intermediate_size", where),
        rope_theta=float(rope["rope_theta"]),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        channels=4,
        patch_size=2,
    )


def write_config(c: MonoFormerConfig, max_length: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": max_length,
        "model_type": "llama",
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": c.vocab_size,
    }


def table(c: MonoFormerConfig, vocab: int) -> list[Entry]:
    """Entries of the text layers of `models.monoformer`: embedding, decoder, text head.

    Args:
      vocab: rows of the original's embedding and head. Ours are padded with zeros, so that they can
        be sharded; the padding always gets probability 0.
    """
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
    ours, theirs = "decoder/layers", "model.layers.{}"

    def pad(x):
        return np.pad(x, ((0, c.padded_vocab - len(x)), (0, 0)))

    def heads(count):
        return (lambda x: x.T.reshape(c.embed_dim, count, H),
                lambda x: x.reshape(c.embed_dim, count * H).T)  # fmt: skip

    entries = [
        Entry("token_embedding", "model.embed_tokens.weight", pad, lambda x: x[:vocab]),
        Entry("text_head", "lm_head.weight", lambda x: pad(x).T, lambda x: x.T[:vocab]),
        Entry("decoder/norm/scale", "model.norm.weight"),
        Entry(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Entry(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        Entry(
            f"{ours}/attention/out", f"{theirs}.self_attn.o_proj.weight",
            lambda x: x.T.reshape(N, H, c.embed_dim), lambda x: x.reshape(N * H, c.embed_dim).T,
        ),
    ]  # fmt: skip
    for part, count in (("q", N), ("k", K), ("v", K)):
        name = f"{theirs}.self_attn.{part}_proj.weight"
        entries.append(Entry(f"{ours}/attention/{part}", name, *heads(count)))
    for part in ("gate", "up", "down"):
        name = f"{theirs}.mlp.{part}_proj.weight"
        entries.append(Entry(f"{ours}/mlp/{part}", name, transpose, transpose))
    return entries
