"""MonoFormer: embed three kinds of token, one decoder, a text head and an image head.

    TEXT   token embedding
    TIME   projected embedding of the noise level of its image
    PATCH  linear in the (noised) patch values, plus a 2-D sin-cos position
      └─> decoder under the interval mask ─┬─> text head   logits [B, L, V]
                                           └─> image head  velocity [B, L, P] (2P with learned sigma)

Source: section 3 of arXiv 2409.16280 and `monoformer.py` of its reference code. One change: the time
token's projector is not initialised to zero, which in the original keeps the token constant for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monoformer_jax.attention import IntervalMask, interval_mask
from monoformer_jax.batch import PATCH, TEXT, TIME
from monoformer_jax.config import ModelConfig
from monoformer_jax.nn.decoder import Decoder, KVCache
from monoformer_jax.nn.layers import Axes, Linear, parameter
from monoformer_jax.nn.lora import Adapters

TIME_FEATURES = 256


def angles(x: jax.Array, count: int) -> jax.Array:
    """[...] -> float32 [..., count]: x times geometric frequencies from 1 down to 1e-4."""
    frequency = 10_000.0 ** (-jnp.arange(count, dtype=jnp.float32) / count)
    return x.astype(jnp.float32)[..., None] * frequency


def grid_embedding(grid: jax.Array, dim: int) -> jax.Array:
    """2-D position of patches, int [..., 2] (row, column) -> float32 [..., dim].

    The column takes the first half and the row the second, each sines then cosines, as in DiT.
    """
    row, column = (angles(grid[..., i], dim // 4) for i in (0, 1))
    parts = [jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)]
    return jnp.concatenate(parts, -1)


# The original rounds the exponent to float32 first. At 1000 t near 1000 a frequency that is one unit
# in the last place off turns the angle by 6e-5, which is seen in the logits of a time token.
_EXPONENTS = np.float32(-math.log(10_000.0)) * np.arange(TIME_FEATURES // 2, dtype=np.float32)
_TIME_FREQUENCIES = np.exp(np.float64(_EXPONENTS / np.float32(TIME_FEATURES // 2)))


class TimeEmbedding(nnx.Module):
    """Noise level t in [0, 1] -> [..., D]; the features see 1000 t, the clock of DDPM weights."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.hidden = Linear(TIME_FEATURES, dim, (None, "embed_out"), rngs=rngs)
        self.out = Linear(dim, dim, ("embed", "embed_out"), rngs=rngs)

    def __call__(self, t: jax.Array, dtype) -> jax.Array:
        angle = (1000.0 * t)[..., None] * jnp.asarray(_TIME_FREQUENCIES, jnp.float32)
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        return self.out(jax.nn.silu(self.hidden(features.astype(dtype))))


class Projector(nnx.Module):
    """Linear, GELU, linear: makes tokens of time embeddings, or of a vision encoder's features."""

    def __init__(self, d_in: int, dim: int, axes: Axes, rngs: nnx.Rngs):
        self.hidden = Linear(d_in, dim, axes, rngs=rngs)
        self.out = Linear(dim, dim, ("embed", "embed_out"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


def modulate(x: jax.Array, modulation: Linear, embedding: jax.Array, image_of: jax.Array):
    """x [B, L, D] scaled and shifted by its image's time embedding [B, I, D]."""
    both = to_tokens(modulation(jax.nn.silu(embedding)), image_of)
    shift, scale = jnp.split(both, 2, axis=-1)
    return x * (1 + scale) + shift


class ImageHead(nnx.Module):
    """adaLN: LayerNorm without affine, shift and scale from the time embedding; then linear.

    With image_head="add" the time embedding, through one layer, is added and nothing is normed.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.adaln = c.image_head == "adaln"
        width = c.embed_dim * (2 if self.adaln else 1)
        self.modulation = Linear(c.embed_dim, width, ("embed", "embed_out"), rngs=rngs)
        out = c.patch_dim * (2 if c.learn_sigma else 1)
        self.out = Linear(c.embed_dim, out, ("embed", None), rngs=rngs)

    def __call__(self, x: jax.Array, embedding: jax.Array, image_of: jax.Array) -> jax.Array:
        if not self.adaln:
            x = x + to_tokens(self.modulation(jax.nn.silu(embedding)), image_of)
            return self.out(x).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return self.out(modulate(y, self.modulation, embedding, image_of)).astype(jnp.float32)


def image_one_hot(image_ids: jax.Array, images: int, dtype) -> jax.Array:
    """int32 [B, L] -> [B, L, I], a zero row where there is no image."""
    return jax.nn.one_hot(image_ids - 1, images, dtype=dtype)


def to_tokens(per_image: jax.Array, image_of: jax.Array) -> jax.Array:
    """[B, I, D] -> [B, L, D] as a matrix product, which shards and differentiates better than a
    gather; 0 outside images."""
    return jnp.einsum("BID,BLI->BLD", per_image, image_of)


class MonoFormer(nnx.Module):
    """The whole model; see the module docstring for its picture."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.config = c
        V, D = c.padded_vocab, c.embed_dim
        self.token_embedding = parameter(rngs, (V, D), ("vocab", "embed"), 1.0)
        self.patch_embedding = Linear(c.patch_dim, D, (None, "embed_out"), rngs=rngs)
        self.time_embedding = TimeEmbedding(D, rngs)
        if c.time_tokens:
            self.time_token = Projector(D, D, ("embed", "embed_out"), rngs)
        else:
            self.input_modulation = Linear(D, 2 * D, ("embed", "embed_out"), rngs=rngs)
        if c.feature_dim:
            self.feature_projector = Projector(c.feature_dim, D, (None, "embed_out"), rngs)
        self.decoder = Decoder(c, rngs)
        self.text_head = parameter(rngs, (D, V), ("embed", "vocab"), D**-0.5)
        self.image_head = ImageHead(c, rngs)

    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        times: jax.Array,
        mask: IntervalMask,
        cache: KVCache | None = None,
        adapters: Adapters | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeds a stream and runs the decoder over it.

        Args:
          inputs: the fields tokens, kinds, positions, image_ids, denoise, grid [B, L] and patches
            [B, L, P] of the batch contract; patches as the model shall see them, noised where
            denoised. With a vision encoder, features [B, L, F] at the patches of context images.
          times: float [B, I], noise level of each image of the row; image i is times[:, i - 1].
          mask: ranges over the L tokens, or over the cache's slots.
          cache: the tokens are appended to it, from cache.index on.
          adapters: scaled, of the decoder's blocks; see `nn.lora`.

        Returns:
          Hidden states [B, L, D] in the compute dtype for the two heads, and the new cache.
        """
        hidden = self.embed(inputs, times)
        again = None
        if self.config.position_embedding == "every_layer":
            again = self.position(inputs, hidden.dtype)
        return self.decoder(hidden, inputs["positions"], mask, cache, again, adapters)

    def embed(self, inputs: Mapping[str, jax.Array], times: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        kinds = inputs["kinds"][..., None]
        text = self.token_embedding[...].astype(dtype)[inputs["tokens"]]
        patch = self.patch_embedding(inputs["patches"].astype(dtype))
        if c.position_embedding != "none":
            patch = patch + self.position(inputs, dtype)
        embedding = self.time_embedding(times, dtype)
        image_of = image_one_hot(inputs["image_ids"], times.shape[1], dtype)
        if not c.time_tokens:
            modulated = image_of
            if c.context_images == "causal":
                modulated = image_of * inputs["denoise"][..., None]
            patch = modulate(patch, self.input_modulation, embedding, modulated)
        if c.feature_dim:
            features = self.feature_projector(inputs["features"].astype(dtype))
            patch = jnp.where(inputs["denoise"][..., None], patch, features)
        hidden = jnp.where(kinds == PATCH, patch, text)
        if c.time_tokens:
            hidden = jnp.where(
                kinds == TIME, to_tokens(self.time_token(embedding), image_of), hidden
            )
        return hidden

    def position(self, inputs: Mapping[str, jax.Array], dtype) -> jax.Array:
        """2-D embedding [B, L, D] of the patches that have one; what it says elsewhere is not read."""
        position = grid_embedding(inputs["grid"], self.config.embed_dim).astype(dtype)
        c, has = self.config, None
        if c.context_images == "causal":
            has = inputs["denoise"]
        if c.position_embedding == "every_layer":
            painted = inputs["kinds"] == PATCH
            has = painted if has is None else painted & has
        return position if has is None else jnp.where(has[..., None], position, 0)

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> float32 [B, L, V]; the padding of the vocabulary gets probability 0."""
        logits = hidden @ self.text_head[...].astype(hidden.dtype)
        real = jnp.arange(self.config.padded_vocab) < self.config.vocab_size
        return jnp.where(real, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)

    def image_output(self, hidden: jax.Array, image_ids: jax.Array, times: jax.Array) -> jax.Array:
        """[B, L, D] -> float32 [B, L, P] (2P with learned sigma); only PATCH tokens mean anything."""
        image_of = image_one_hot(image_ids, times.shape[1], hidden.dtype)
        return self.image_head(hidden, self.time_embedding(times, hidden.dtype), image_of)


def split_output(output: jax.Array, c: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    """What the image head predicts [..., P], and the numbers of its variance where it has them."""
    if not c.learn_sigma:
        return output, None
    return output[..., : c.patch_dim], output[..., c.patch_dim :]


def attention_mask(c: ModelConfig, inputs: Mapping[str, jax.Array]) -> IntervalMask:
    """Who sees whom in whole rows of the batch contract; see `attention.mask`."""
    kinds = inputs["kinds"]
    if not c.bidirectional_images:
        kinds = jnp.where(kinds == PATCH, TEXT, kinds)
    elif c.context_images == "causal":
        kinds = jnp.where((kinds == PATCH) & ~inputs["denoise"], TEXT, kinds)
    return interval_mask(kinds, inputs["segment_ids"], inputs["image_ids"])


def init(c: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(MonoFormer(c, rngs=nnx.Rngs(key)), nnx.Param))


def bind(c: ModelConfig, params: dict) -> MonoFormer:
    """The model with these parameters; nothing is copied or computed."""
    return nnx.merge(nnx.graphdef(_abstract(c)), params)


def parameter_axes(c: ModelConfig) -> dict:
    """Logical axis names of every parameter, in the tree of `init`; scanned layers lead with one."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(c), nnx.Param)):
        names = variable.get_metadata("axes")
        axes[path] = ("layers",) * (variable.ndim - len(names)) + names
    return nnx.traversals.unflatten_mapping(axes)


def _abstract(c: ModelConfig) -> MonoFormer:
    return nnx.eval_shape(lambda: MonoFormer(c, rngs=nnx.Rngs(0)))
