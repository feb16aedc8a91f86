"""Variants of the original's code, for its weights only: `Config.model.original` selects them.

    time_conditioning="modulation"   scale and shift patches by the noise level; no TIME token
    image_head="add"                 add the noise level embedding before the last layer; no norm
    position_embedding               "every_layer": add before every block; "none": do not add
    context_images="causal"          causal attention in conditioning images, without 2-D positions
    bidirectional_images=False       causal attention in all images, including denoised ones

Source: `monoformer.py` of the reference code. The released weights use "causal" and no other variant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from monoformer_jax.batch import PATCH, TEXT
from monoformer_jax.models.monoformer import MonoFormer
from monoformer_jax.nn.conditioning import broadcast_to_tokens, modulate
from monoformer_jax.nn.layers import Linear


class AddHead(nnx.Module):
    """Image head [B, L, D] -> float32 [B, L, P]: adds the projected time embedding; then linear."""

    def __init__(self, dim: int, outputs: int, rngs: nnx.Rngs, zero: bool = False):
        self.modulation = Linear(dim, dim, ("embed", "embed_out"), rngs=rngs)
        self.out = Linear(dim, outputs, ("embed", None), rngs=rngs, zero=zero)

    def __call__(self, x: jax.Array, embedding: jax.Array, image_of: jax.Array) -> jax.Array:
        x = x + broadcast_to_tokens(self.modulation(jax.nn.silu(embedding)), image_of)
        return self.out.float32(x)


class OriginalMonoFormer(MonoFormer):
    """MonoFormer with the variants of the original."""

    def init_time(self, rngs):
        c = self.config
        if c.layout.time_tokens:
            return super().init_time(rngs)
        axes = ("embed", "embed_out")
        self.input_modulation = Linear(c.embed_dim, 2 * c.embed_dim, axes, rngs=rngs)

    def make_image_head(self, rngs):
        c = self.config
        if c.original.image_head == "adaln":
            return super().make_image_head(rngs)
        return AddHead(c.embed_dim, c.output_dim, rngs, c.zero_image_head)

    def embed_patches(self, inputs, embedding, image_of):
        c, dtype = self.config, embedding.dtype
        patch = self.patch_embedding(inputs["patches"].astype(dtype))
        if c.original.position_embedding != "none":
            patch = patch + self.position(inputs, dtype)
        if c.layout.time_tokens:
            return patch
        if c.original.context_images == "causal":
            image_of = image_of * inputs["denoise"][..., None]
        return modulate(patch, self.input_modulation, embedding, image_of)

    def add_time(self, hidden, token_types, embedding, image_of):
        if not self.config.layout.time_tokens:
            return hidden
        return super().add_time(hidden, token_types, embedding, image_of)

    def position(self, inputs, dtype):
        c, position = self.config.original, super().position(inputs, dtype)
        has_position = True
        if c.context_images == "causal":
            has_position = inputs["denoise"]
        if c.position_embedding == "every_layer":
            has_position = has_position & (inputs["token_types"] == PATCH)
        return position if has_position is True else jnp.where(has_position[..., None], position, 0)

    def input_bias(self, inputs):
        if self.config.original.position_embedding != "every_layer":
            return None
        return self.position(inputs, jnp.dtype(self.config.dtype))

    @staticmethod
    def mask_token_types(c, inputs):
        causal = inputs["token_types"] == PATCH
        if c.original.bidirectional_images:
            if c.original.context_images != "causal":
                return inputs["token_types"]
            causal = causal & ~inputs["denoise"]
        return jnp.where(causal, TEXT, inputs["token_types"])
