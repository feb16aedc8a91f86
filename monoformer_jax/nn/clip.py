"""CLIP: its vision encoder as LLaVA-style models use it, and both encoders for CLIP scores.

The vision features are the hidden states before the last layer, without the class token and the
final norm: one vector per patch. Embeddings of images and texts are a token's projected final state.
Source: Radford et al. (arXiv 2103.00020); the layers are those of the published weights.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from einops import rearrange
from flax import nnx

from monoformer_jax.errors import require
from monoformer_jax.nn.layers import Linear, full_precision, parameter

MEAN = (0.48145466, 0.4578275, 0.40821073)  # per channel, of the training pixels
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The defaults are ViT-L/14 at 224 pixels: 256 patches of 1024 features."""

    width: int = 1024
    mlp_dim: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    norm_eps: float = 1e-5

    def __post_init__(self):
        for whole, part in (("width", "num_heads"), ("image_size", "patch_size")):
            a, b = getattr(self, whole), getattr(self, part)
            require(a % b == 0, f"CLIP {whole}={a} is not a multiple of {part}={b}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The defaults are those of ViT-L/14's text encoder."""

    width: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 49408
    max_tokens: int = 77
    norm_eps: float = 1e-5

    def __post_init__(self):
        require(
            self.width % self.num_heads == 0,
            f"CLIP text width={self.width} is not a multiple of num_heads={self.num_heads}",
        )


@dataclasses.dataclass(frozen=True)
class DualConfig:
    """Both encoders, and the dimension of the embeddings."""

    vision: ClipConfig = ClipConfig()
    text: ClipTextConfig = ClipTextConfig()
    embed_dim: int = 768


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(dim), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x - x.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y * self.scale[...] + self.bias[...]


class Layer(nnx.Module):
    """Pre-norm attention and an MLP with the quick GELU, x σ(1.702 x)."""

    def __init__(self, c: ClipConfig | ClipTextConfig, rngs: nnx.Rngs):
        D, F = c.width, c.mlp_dim
        self.heads = c.num_heads
        self.norm1 = LayerNorm(D, c.norm_eps)
        self.q, self.k, self.v, self.out = (
            Linear(D, D, ("embed", "embed_out"), rngs=rngs) for _ in range(4)
        )
        self.norm2 = LayerNorm(D, c.norm_eps)
        self.up = Linear(D, F, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(F, D, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, causal: bool = False) -> jax.Array:
        y = self.norm1(x)
        q, k, v = (
            rearrange(part(y), "B L (N H) -> B L N H", N=self.heads)
            for part in (self.q, self.k, self.v)
        )
        scores = jnp.einsum("BLNH,BSNH->BNLS", q, k) * q.shape[-1] ** -0.5
        if causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("BNLS,BSNH->BLNH", jax.nn.softmax(scores), v)
        x = x + self.out(rearrange(out, "B L N H -> B L (N H)"))
        y = self.up(self.norm2(x))
        return x + self.down(y * jax.nn.sigmoid(1.702 * y))


def _stack(c: ClipConfig | ClipTextConfig, rngs: nnx.Rngs) -> Layer:
    """All layers, on the first axis of their parameters."""
    return nnx.split_rngs(splits=c.num_layers)(nnx.vmap(lambda rngs: Layer(c, rngs)))(rngs)


class ClipVision(nnx.Module):
    """[B, h, w, 3] -> hidden states of every layer; float32."""

    def __init__(self, c: ClipConfig, *, rngs: nnx.Rngs):
        D, pixels = c.width, 3 * c.patch_size**2
        self.config = c
        self.patch_embedding = parameter(rngs, (pixels, D), (None, "embed_out"), pixels**-0.5)
        self.class_embedding = parameter(rngs, (D,), ("embed",), D**-0.5)
        self.position_embedding = parameter(rngs, (1 + c.patches, D), (None, "embed"), D**-0.5)
        self.norm_in = LayerNorm(D, c.norm_eps)
        self.layers = _stack(c, rngs)
        self.norm_out = LayerNorm(D, c.norm_eps)  # of the class token, for `Clip` alone

    def states(self, images: jax.Array) -> jax.Array:
        """[B, h, w, 3] from `preprocess` -> [layers + 1, B, 1 + patches, D]."""
        with full_precision(jnp.float32):
            return self._states(images)

    def _states(self, images):
        p = self.config.patch_size
        x = rearrange(images, "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        x = x @ self.patch_embedding[...]
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], 1) + self.position_embedding[...]
        x = self.norm_in(x)

        def body(x, layer):
            x = layer(x)
            return x, x

        _, states = jax.lax.scan(body, x, self.layers)
        return jnp.concatenate([x[None], states])

    def features(self, images: jax.Array) -> jax.Array:
        """[B, h, w, 3] -> [B, patches, D]."""
        return self.states(images)[-2][:, 1:]


class ClipText(nnx.Module):
    """Token ids [B, L], L at most c.max_tokens, to final states [B, L, D]; float32."""

    def __init__(self, c: ClipTextConfig, *, rngs: nnx.Rngs):
        D = c.width
        self.token_embedding = parameter(rngs, (c.vocab_size, D), (None, "embed"), 0.02)
        self.position_embedding = parameter(rngs, (c.max_tokens, D), (None, "embed"), 0.01)
        self.layers = _stack(c, rngs)
        self.norm_out = LayerNorm(D, c.norm_eps)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.token_embedding[...], tokens, 0)
        x = x + self.position_embedding[...][: tokens.shape[1]]
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, causal=True), None), x, self.layers)
        return self.norm_out(x)


class Clip(nnx.Module):
    """Images and texts to unit vectors [B, E], whose product is their cosine similarity."""

    def __init__(self, c: DualConfig, *, rngs: nnx.Rngs):
        self.vision, self.text = ClipVision(c.vision, rngs=rngs), ClipText(c.text, rngs=rngs)
        self.visual_projection, self.text_projection = (
            parameter(rngs, (part.width, c.embed_dim), ("embed", None), part.width**-0.5)
            for part in (c.vision, c.text)
        )

    def embed_images(self, images: jax.Array) -> jax.Array:
        """[B, h, w, 3] from `preprocess`."""
        with full_precision(jnp.float32):
            pooled = self.vision.norm_out(self.vision.states(images)[-1][:, 0])
            return _unit(pooled @ self.visual_projection[...])

    def embed_texts(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Token ids [B, L], of which the first `lengths` [B] are read; the last is <|endoftext|>."""
        with full_precision(jnp.float32):
            states = self.text(tokens)
            pooled = jnp.take_along_axis(states, lengths[:, None, None] - 1, 1)[:, 0]
            return _unit(pooled @ self.text_projection[...])


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def crop(image: PIL.Image.Image, c: ClipConfig) -> PIL.Image.Image:
    """Resizes (shorter side, bicubic) and center-crops; a crop stays as it is."""
    image = image.convert("RGB")
    size, (width, height) = c.image_size, image.size
    short = min(width, height)
    image = image.resize((size * width // short, size * height // short), PIL.Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def preprocess(image: PIL.Image.Image, c: ClipConfig) -> np.ndarray:
    """`crop`, normalized to float32 [size, size, 3]."""
    pixels = np.asarray(crop(image, c), np.float32) / 255
    return (pixels - np.float32(MEAN)) / np.float32(STD)


def init(c: ClipConfig | DualConfig, key: jax.Array) -> dict:
    """Randomly initialized parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(_build(c, nnx.Rngs(key)), nnx.Param))


def bind(c: ClipConfig | DualConfig, params: dict) -> ClipVision | Clip:
    """The model with these parameters; nothing is copied or computed."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: _build(c, nnx.Rngs(0)))), params)


def _build(c: ClipConfig | DualConfig, rngs: nnx.Rngs) -> ClipVision | Clip:
    return (Clip if isinstance(c, DualConfig) else ClipVision)(c, rngs=rngs)
