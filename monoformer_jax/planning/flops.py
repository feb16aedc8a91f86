"""Floating-point operations of the model: matrix products alone, two for a multiply and add."""

from __future__ import annotations

from monoformer_jax.config import ModelConfig

TRAINING = 3  # a backward pass is two forward passes; what remat repeats is no work of the model


def layers(c: ModelConfig) -> int:
    """Of a token through all blocks, attention's scores left out."""
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim  # q, out; k, v
    return 2 * c.num_layers * c.embed_dim * (heads + 3 * c.mlp_dim)


def attention(c: ModelConfig) -> int:
    """Of a (query, key) pair that the mask lets see each other, in all blocks."""
    return 4 * c.num_layers * c.num_heads * c.head_dim


def text_head(c: ModelConfig) -> int:
    """Of a token whose next token is predicted."""
    return 2 * c.embed_dim * c.vocab_size


def patch(c: ModelConfig) -> int:
    """Of a patch: its embedding, and the image head."""
    return 2 * c.embed_dim * c.patch_dim * (3 if c.learn_sigma else 2)


def recomputed(c: ModelConfig) -> int:
    """Of a token in the second forward pass that remat="nothing_saveable" makes: all but the last
    product of a block, which no gradient needs."""
    if c.remat != "nothing_saveable":
        return 0
    return layers(c) - 2 * c.num_layers * c.embed_dim * c.mlp_dim
