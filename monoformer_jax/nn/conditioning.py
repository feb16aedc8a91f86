"""Conditioning on noise levels and patch positions: embeddings, projectors, the adaLN head."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monoformer_jax.attention.tpu_forward import matmul_precision
from monoformer_jax.nn.layers import Axes, Linear
from monoformer_jax.parallel import constrain

TIME_FEATURES = 256


def angles(x: jax.Array, count: int) -> jax.Array:
    """[...] -> float32 [..., count]: x times geometric frequencies from 1 down towards 1e-4."""
    frequency = 10_000.0 ** (-jnp.arange(count, dtype=jnp.float32) / count)
    return x.astype(jnp.float32)[..., None] * frequency


def sincos_2d(patch_positions: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal 2-D position embedding, int [..., 2] (row, column) -> float32 [..., dim].

    The first half encodes the column and the second the row, each sines then cosines, as in DiT.
    """
    row, column = (angles(patch_positions[..., i], dim // 4) for i in (0, 1))
    parts = [jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)]
    return jnp.concatenate(parts, -1)


# The original rounds the exponent to float32 first. At 1000 t near 1000, an error of one unit in the
# last place of a frequency changes the angle by 6e-5, which is visible in a time token's logits.
_EXPONENTS = np.float32(-math.log(10_000.0)) * np.arange(TIME_FEATURES // 2, dtype=np.float32)
_TIME_FREQUENCIES = np.exp(np.float64(_EXPONENTS / np.float32(TIME_FEATURES // 2)))


class TimeEmbedding(nnx.Module):
    """Noise level t in [0, 1] -> [..., D]; the sinusoids take 1000 t, the timestep of DDPM weights."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.hidden = Linear(TIME_FEATURES, dim, (None, "embed_out"), rngs=rngs)
        self.out = Linear(dim, dim, ("embed", "embed_out"), rngs=rngs)

    def __call__(self, t: jax.Array, dtype) -> jax.Array:
        angle = (1000.0 * t)[..., None] * jnp.asarray(_TIME_FREQUENCIES, jnp.float32)
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        embedding = self.out(jax.nn.silu(self.hidden(features.astype(dtype))))
        return constrain(embedding, ("batch", None, None))


class Projector(nnx.Module):
    """Linear, GELU, linear: projects time embeddings or vision encoder features to tokens."""

    def __init__(self, d_in: int, dim: int, axes: Axes, rngs: nnx.Rngs):
        self.hidden = Linear(d_in, dim, axes, rngs=rngs)
        self.out = Linear(dim, dim, ("embed", "embed_out"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters, computed in float32, returned in the input's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulate(x: jax.Array, modulation: Linear, embedding: jax.Array, image_of: jax.Array):
    """Scales and shifts x [B, L, D] by the time embedding [B, I, D] of each token's image (adaLN)."""
    both = broadcast_to_tokens(modulation(jax.nn.silu(embedding)), image_of)
    shift, scale = jnp.split(both, 2, axis=-1)
    return x * (1 + scale) + shift


class ImageHead(nnx.Module):
    """adaLN: LayerNorm without affine parameters, shift and scale from the time embedding; linear."""

    def __init__(self, dim: int, outputs: int, rngs: nnx.Rngs, zero: bool = False):
        self.modulation = Linear(dim, 2 * dim, ("embed", "embed_out"), rngs=rngs)
        self.out = Linear(dim, outputs, ("embed", None), rngs=rngs, zero=zero)

    def __call__(self, x: jax.Array, embedding: jax.Array, image_of: jax.Array) -> jax.Array:
        """[B, L, D], time embeddings [B, I, D], image one-hot [B, L, I] -> float32 [B, L, P]."""
        y = modulate(layer_norm(x), self.modulation, embedding, image_of)
        return self.out.float32(y)


def image_one_hot(image_ids: jax.Array, images: int, dtype) -> jax.Array:
    """int32 [B, L] -> [B, L, I]; zeros for tokens outside images."""
    return jax.nn.one_hot(image_ids - 1, images, dtype=dtype)


def broadcast_to_tokens(per_image: jax.Array, image_of: jax.Array) -> jax.Array:
    """[B, I, D] -> [B, L, D]; 0 for tokens outside images.

    It is a matrix product, which shards and differentiates better than a gather; it does not round.
    """
    per_image = constrain(per_image, ("batch", None, None))
    precision = matmul_precision(per_image.dtype)
    return jnp.einsum("BID,BLI->BLD", per_image, image_of, precision=precision)
