"""MonoFormer: embed three types of token, one decoder, a text head and an image head.

    TEXT   token embedding
    TIME   projected embedding of the noise level of its image
    PATCH  linear in the (noised) patch values, plus a 2-D sin-cos position
      └─> decoder under the interval mask ─┬─> text head   logits [B, L, V]
                                           └─> image head  velocity [B, L, P] (2P with learned sigma)

Source: section 3 of arXiv 2409.16280 and `monoformer.py` of its reference code. One change: the time
token's projector is not initialised to zero, which in the original keeps the token constant for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from monoformer_jax.attention import IntervalMask, interval_mask
from monoformer_jax.batch import PATCH, TIME
from monoformer_jax.config import ModelConfig, OriginalConfig
from monoformer_jax.nn.conditioning import (
    ImageHead,
    Projector,
    TimeEmbedding,
    broadcast_to_tokens,
    image_one_hot,
    sincos_2d,
)
from monoformer_jax.nn.decoder import Decoder, KVCache
from monoformer_jax.nn.layers import Linear, parameter
from monoformer_jax.nn.lora import Adapters


class MonoFormer(nnx.Module):
    """The whole model; see the module docstring for its picture."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.config = c
        V, D = c.padded_vocab, c.embed_dim
        self.token_embedding = parameter(rngs, (V, D), ("vocab", "embed"), 1.0)
        self.patch_embedding = Linear(c.patch_dim, D, (None, "embed_out"), rngs=rngs)
        self.time_embedding = TimeEmbedding(D, rngs)
        self.init_time(rngs)
        if c.feature_dim:
            self.feature_projector = Projector(c.feature_dim, D, (None, "embed_out"), rngs)
        self.decoder = Decoder(c, rngs)
        self.text_head = parameter(rngs, (D, V), ("embed", "vocab"), D**-0.5)
        self.image_head = self.make_image_head(rngs)

    def init_time(self, rngs: nnx.Rngs) -> None:
        D = self.config.embed_dim
        self.time_token = Projector(D, D, ("embed", "embed_out"), rngs)

    def make_image_head(self, rngs: nnx.Rngs) -> ImageHead:
        return ImageHead(self.config.embed_dim, self.config.output_dim, rngs)

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
          inputs: the fields tokens, token_types, positions, image_ids, denoise [B, L],
            patch_positions [B, L, 2] and patches [B, L, P] of the batch contract; patches as the
            model shall see them, noised where denoised. With a vision encoder, features [B, L, F]
            at the patches of context images.
          times: float [B, I], noise level of each image of the row; image i is times[:, i - 1].
          mask: ranges over the L tokens, or over the cache's slots.
          cache: the tokens are appended to it, from cache.index on.
          adapters: scaled, of the decoder's blocks; see `nn.lora`.

        Returns:
          Hidden states [B, L, D] in the compute dtype for the two heads, and the new cache.
        """
        hidden = self.embed(inputs, times)
        input_bias = self.input_bias(inputs)
        return self.decoder(hidden, inputs["positions"], mask, cache, input_bias, adapters)

    def embed(self, inputs: Mapping[str, jax.Array], times: jax.Array) -> jax.Array:
        """The stream [B, L, D] in the compute dtype."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        token_types = inputs["token_types"][..., None]
        embedding = self.time_embedding(times, dtype)
        image_of = image_one_hot(inputs["image_ids"], times.shape[1], dtype)
        text = self.token_embedding[...].astype(dtype)[inputs["tokens"]]
        patch = self.embed_patches(inputs, embedding, image_of)
        if c.feature_dim:
            features = self.feature_projector(inputs["features"].astype(dtype))
            patch = jnp.where(inputs["denoise"][..., None], patch, features)
        hidden = jnp.where(token_types == PATCH, patch, text)
        return self.add_time(hidden, token_types, embedding, image_of)

    def embed_patches(self, inputs, embedding, image_of) -> jax.Array:
        """[B, L, D], read at PATCH tokens alone."""
        dtype = embedding.dtype
        return self.patch_embedding(inputs["patches"].astype(dtype)) + self.position(inputs, dtype)

    def add_time(self, hidden, token_types, embedding, image_of) -> jax.Array:
        """The stream with its TIME tokens."""
        time = broadcast_to_tokens(self.time_token(embedding), image_of)
        return jnp.where(token_types == TIME, time, hidden)

    def position(self, inputs: Mapping[str, jax.Array], dtype) -> jax.Array:
        """2-D position embedding of patches, [B, L, D]."""
        return sincos_2d(inputs["patch_positions"], self.config.embed_dim).astype(dtype)

    def input_bias(self, inputs: Mapping[str, jax.Array]) -> jax.Array | None:
        """What is added before every block but the first, [B, L, D]."""
        return None

    @staticmethod
    def mask_token_types(c: ModelConfig, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """The token types that the mask follows; int32 [B, L]."""
        return inputs["token_types"]

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
    """Which keys each token of whole rows attends to; see `attention.mask`."""
    token_types = _model_class(c).mask_token_types(c, inputs)
    return interval_mask(token_types, inputs["segment_ids"], inputs["image_ids"])


def init(c: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(_model_class(c)(c, rngs=nnx.Rngs(key)), nnx.Param))


def bind(c: ModelConfig, params: dict) -> MonoFormer:
    """The model with these parameters; nothing is copied or computed."""
    return nnx.merge(nnx.graphdef(_abstract(c)), params)


def logical_axes(c: ModelConfig) -> dict:
    """Logical axis names of every parameter, in the tree of `init`; scanned layers lead with one."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(c), nnx.Param)):
        names = variable.get_metadata("axes")
        axes[path] = ("layers",) * (variable.ndim - len(names)) + names
    return nnx.traversals.unflatten_mapping(axes)


def _abstract(c: ModelConfig) -> MonoFormer:
    return nnx.eval_shape(lambda: _model_class(c)(c, rngs=nnx.Rngs(0)))


def _model_class(c: ModelConfig) -> type[MonoFormer]:
    if c.original == OriginalConfig():
        return MonoFormer
    from monoformer_jax.models.original import OriginalMonoFormer  # which derives from ours

    return OriginalMonoFormer
