"""MonoFormer: embeddings of three token types, one decoder, a text head and an image head.

    TEXT   token embedding
    TIME   projected embedding of the image's noise level
    PATCH  linear in the (noised) patch values, or a U-Net; plus a 2-D sin-cos position
      └─> decoder under the interval mask ─┬─> text head   logits [B, L, V]
                                           └─> image head  prediction [B, L, P], and P of its variance

Source: section 3 of arXiv 2409.16280 and `monoformer.py` of its reference code. One change: the time
token's projector is not initialized to zero, which in the original keeps the token constant.

The functions below the classes implement the model interface, see `models`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monoformer_jax.attention import IntervalMask, interval_mask, row_masks
from monoformer_jax.batch import PAD, PATCH, TIME, Batch, image_block, text_block
from monoformer_jax.config import TokenLayout, at_least, one_of, positive
from monoformer_jax.errors import require
from monoformer_jax.models.outputs import Outputs
from monoformer_jax.nn.cache import DecodeState, KVCache
from monoformer_jax.nn.conditioning import (
    ImageHead,
    Projector,
    TimeEmbedding,
    broadcast_to_tokens,
    image_one_hot,
    sincos_2d,
)
from monoformer_jax.nn.config import DecoderConfig
from monoformer_jax.nn.decoder import Decoder
from monoformer_jax.nn.layers import Linear, parameter


@dataclasses.dataclass(frozen=True)
class OriginalConfig:
    """Variants for the original's weights, see models/original.py."""

    time_conditioning: str = "token"  # or "modulation"
    image_head: str = "adaln"  # or "add"
    position_embedding: str = "input"  # or "every_layer", or "none"
    context_images: str = "bidirectional"  # or "causal"
    bidirectional_images: bool = True

    def __post_init__(self):
        for name, choices in (
            ("time_conditioning", ("token", "modulation")),
            ("image_head", ("adaln", "add")),
            ("position_embedding", ("input", "every_layer", "none")),
            ("context_images", ("bidirectional", "causal")),
        ):
            one_of(f"model.original.{name}", getattr(self, name), choices)


@dataclasses.dataclass(frozen=True)
class MonoFormerConfig(DecoderConfig):
    """Config of the model; `SIZES` holds named sizes."""

    kind: str = "monoformer"
    vocab_size: int = 262  # of the tokenizer; embedding tables are padded to a multiple of 128
    channels: int = 1  # channels of the image or latent
    patch_size: int = 2
    # "linear" embeds and predicts each patch by itself, "unet" with the image around it, for patches of
    # 2, 4 or 8: see models/patch_codec.py.
    patch_codec: str = "linear"
    # Of the U-Net: channels at full resolution (twice as many below), blocks of a level on each side,
    # and patches of the largest image, (data.image_size / patch_size) squared.
    codec_dim: int = 64
    codec_blocks: int = 1
    max_patches: int = 0
    feature_dim: int = 0  # feature size of the vision encoder for conditioning images; 0: none
    # The image head's last layer starts at zero, as in DiT (arXiv 2212.09748).
    zero_image_head: bool = False
    original: OriginalConfig = OriginalConfig()
    predict_variance: bool = False  # set by Config from objective.learn_sigma

    def __post_init__(self):
        super().__post_init__()
        positive(self, "model", "vocab_size", "channels", "patch_size")
        at_least(self, "model", 0, "feature_dim", "max_patches")
        one_of("model.patch_codec", self.patch_codec, ("linear", "unet"))
        if self.patch_codec == "unet":
            self._check_unet()
        else:
            require(
                not self.max_patches,
                f"model.max_patches={self.max_patches} is for model.patch_codec='unet'",
            )
        require(
            self.embed_dim % 4 == 0,
            f"model.embed_dim={self.embed_dim} must be a multiple of 4 for the 2-D position embedding",
        )

    def _check_unet(self) -> None:
        positive(self, "model", "codec_dim", "codec_blocks")
        require(
            self.patch_size in (2, 4, 8),
            f"model.patch_codec='unet' takes model.patch_size 2, 4 or 8, not {self.patch_size}",
        )
        require(
            self.max_patches > 0 and self.side**2 == self.max_patches,
            f"model.patch_codec='unet' needs model.max_patches, the patches of the largest image, a "
            f"square number; it is {self.max_patches}",
        )
        require(
            self.original == OriginalConfig(),
            "model.patch_codec='unet' takes no variant of model.original",
        )

    @property
    def side(self) -> int:
        """Patches of a side of the largest image of the U-Net."""
        return math.isqrt(self.max_patches)

    @property
    def layout(self) -> TokenLayout:
        """Token layout, for data, batches and packing."""
        time_tokens = 1 if self.original.time_conditioning == "token" else 0
        return TokenLayout(
            self.vocab_size, self.channels, self.patch_size, time_tokens, self.feature_dim,
            max_patches=self.max_patches,
        )  # fmt: skip

    @property
    def padded_vocab(self) -> int:
        """Vocabulary size padded for sharding; the padding has probability 0."""
        return -(-self.vocab_size // 128) * 128

    @property
    def output_dim(self) -> int:
        """Image head outputs per patch: P, or 2 P with a predicted variance."""
        return self.layout.patch_dim * (2 if self.predict_variance else 1)


Config = MonoFormerConfig

# Named sizes; tinyllama_1b is the backbone of the paper.
_LATENT = {"vocab_size": 32_004, "channels": 4, "patch_size": 2}
# On a CPU, saving the attention scores is slower than recomputing them (1.4x for digits).
_ON_CPU = "save_names:attention_out,mlp_hidden"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
             "mlp_dim": 64, "dtype": "float32", "remat": _ON_CPU},
    "small": {"num_layers": 6, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
              "mlp_dim": 344, "dtype": "float32", "remat": _ON_CPU},
    "tinyllama_1b": _LATENT | {"num_layers": 22, "embed_dim": 2048, "num_heads": 32,
                               "num_kv_heads": 4, "head_dim": 64, "mlp_dim": 5632},
    # LLaMA blocks with the parameter counts of Transfusion's models (arXiv 2408.11039), on latents of 8
    # channels; layers and widths were not compared with the paper's table.
    **{
        f"transfusion_{name}": _LATENT | {
            "channels": 8, "num_layers": layers, "embed_dim": dim, "num_heads": heads,
            "num_kv_heads": heads, "head_dim": dim // heads, "mlp_dim": mlp,
        } for name, layers, dim, heads, mlp in (
            ("0.16b", 16, 768, 12, 2048), ("0.37b", 24, 1024, 16, 2816), ("0.76b", 24, 1536, 24, 4096),
            ("1.4b", 24, 2048, 16, 5632), ("7b", 32, 4096, 32, 11_008),
        )
    },
    "7b": _LATENT | {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 32,
                     "head_dim": 128, "mlp_dim": 11_008},
}  # fmt: skip


class MonoFormer(nnx.Module):
    """The complete model; the module docstring shows its structure."""

    def __init__(self, c: MonoFormerConfig, *, rngs: nnx.Rngs):
        self.config = c
        V, D = c.padded_vocab, c.embed_dim
        self.token_embedding = parameter(rngs, (V, D), ("vocab", "embed"), 1.0)
        self.patch_embedding = self.make_patch_embedding(rngs)
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

    def make_patch_embedding(self, rngs: nnx.Rngs) -> nnx.Module:
        c = self.config
        return Linear(c.layout.patch_dim, c.embed_dim, (None, "embed_out"), rngs=rngs)

    def make_image_head(self, rngs: nnx.Rngs) -> nnx.Module:
        c = self.config
        return ImageHead(c.embed_dim, c.output_dim, rngs, c.zero_image_head)

    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        times: jax.Array,
        mask: IntervalMask | tuple[IntervalMask, ...],
        cache: KVCache | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeds a token sequence and runs the decoder on it.

        Args:
          inputs: the fields tokens, token_types, positions, image_ids, denoise [B, L],
            patch_positions [B, L, 2] and patches [B, L, P] of the batch contract; patches are
            noised where `denoise` is set. With a vision encoder, features [B, L, F] at the patches
            of conditioning images.
          times: float [B, I], noise level of each image of the row; image i is times[:, i - 1].
          mask: key ranges over the L tokens, or over the cache slots; of several masks the union.
          cache: the tokens are appended to it, from cache.index on.
          adapters: scaled adapters of the decoder blocks, see `nn.lora`.

        Returns:
          Hidden states [B, L, D] in the compute dtype for the two heads, and the new cache.
        """
        hidden = self.embed(inputs, times)
        input_bias = self.input_bias(inputs)
        return self.decoder(hidden, inputs["positions"], mask, cache, input_bias, adapters)

    def embed(self, inputs: Mapping[str, jax.Array], times: jax.Array) -> jax.Array:
        """Returns the token embeddings [B, L, D] in the compute dtype."""
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
        """Returns patch embeddings [B, L, D], valid at PATCH tokens only."""
        dtype = embedding.dtype
        return self.patch_embedding(inputs["patches"].astype(dtype)) + self.position(inputs, dtype)

    def add_time(self, hidden, token_types, embedding, image_of) -> jax.Array:
        """Replaces TIME tokens by embeddings of their noise levels."""
        time = broadcast_to_tokens(self.time_token(embedding), image_of)
        return jnp.where(token_types == TIME, time, hidden)

    def position(self, inputs: Mapping[str, jax.Array], dtype) -> jax.Array:
        """Returns the 2-D position embedding of patches, [B, L, D]."""
        return sincos_2d(inputs["patch_positions"], self.config.embed_dim).astype(dtype)

    def input_bias(self, inputs: Mapping[str, jax.Array]) -> jax.Array | None:
        """Returns a bias [B, L, D] added to the input of every block except the first, or None."""
        return None

    @staticmethod
    def mask_token_types(c: MonoFormerConfig, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the token types that determine the mask, int32 [B, L]."""
        return inputs["token_types"]

    def predict(
        self,
        inputs: Mapping[str, jax.Array],
        times: jax.Array,
        mask: IntervalMask | tuple[IntervalMask, ...],
        cache: KVCache | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Runs the model and its image head; arguments as above.

        Returns:
          Hidden states [B, L, D]; prediction float32 [B, L, P] and variance or None, valid at PATCH
          tokens only.
        """
        hidden, _ = self(inputs, times, mask, cache, adapters)
        return hidden, *self.image_output(hidden, inputs["image_ids"], times)

    def image_output(self, hidden: jax.Array, image_ids: jax.Array, times: jax.Array):
        """Returns prediction float32 [B, L, P] and variance or None, valid at PATCH tokens only."""
        image_of = image_one_hot(image_ids, times.shape[1], hidden.dtype)
        output = self.image_head(hidden, self.time_embedding(times, hidden.dtype), image_of)
        if not self.config.predict_variance:
            return output, None
        return tuple(jnp.split(output, 2, axis=-1))


def _model_class(c: MonoFormerConfig) -> type[MonoFormer]:
    if c.patch_codec == "unet":
        from monoformer_jax.models.patch_codec import UNetMonoFormer  # imports this module

        return UNetMonoFormer
    if c.original == OriginalConfig():
        return MonoFormer
    from monoformer_jax.models.original import OriginalMonoFormer  # imports this module

    return OriginalMonoFormer


@functools.cache
def _abstract(c: MonoFormerConfig) -> MonoFormer:
    return nnx.eval_shape(lambda: _model_class(c)(c, rngs=nnx.Rngs(0)))


def bind(c: MonoFormerConfig, params: dict) -> MonoFormer:
    """Returns the nnx module with these parameters, without copying them."""
    return nnx.merge(nnx.graphdef(_abstract(c)), params)


def attention_mask(c: MonoFormerConfig, inputs: Mapping[str, jax.Array]) -> IntervalMask:
    """Returns the key range of each token of rows without noised copies, see `attention.mask`."""
    token_types = _model_class(c).mask_token_types(c, inputs)
    return interval_mask(token_types, inputs["segment_ids"], inputs["image_ids"])


def init(c: MonoFormerConfig, key: jax.Array) -> dict:
    """Initializes parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(_model_class(c)(c, rngs=nnx.Rngs(key)), nnx.Param))


def logical_axes(c: MonoFormerConfig) -> dict:
    """Logical axis names of every parameter, in the tree of `init`; stacked ones begin with layers."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(c), nnx.Param)):
        names = variable.get_metadata("axes")
        axes[path] = ("layers",) * (variable.ndim - len(names)) + names
    return nnx.traversals.unflatten_mapping(axes)


def adapters(c: MonoFormerConfig) -> dict[str, tuple[str, str]]:
    """Matrices that LoRA adapts: path of the stacked parameter -> its input and output axes."""
    block = {
        "attention/q": ("embed", "heads"),
        "attention/k": ("embed", "kv_heads"),
        "attention/v": ("embed", "kv_heads"),
        "attention/out": ("heads", "embed"),
        "mlp/gate": ("embed", "mlp"),
        "mlp/up": ("embed", "mlp"),
        "mlp/down": ("mlp", "embed"),
    }
    return {f"decoder/layers/{name}": axes for name, axes in block.items()}


FROZEN = ("decoder", "token_embedding", "text_head")  # parameters that are frozen with adapters


def flops(c: MonoFormerConfig, *, tokens: int = 0, pairs: int = 0, patches: int = 0, text: int = 0):
    """FLOPs of a forward pass: matrix products only, two per multiply-add.

    Args:
      tokens: number of tokens in the decoder.
      pairs: number of (query, key) pairs that the mask allows.
      patches: number of patches that are embedded and predicted by the image head.
      text: number of tokens whose next token is predicted.
    """
    flops = DecoderConfig.flops(c, tokens, pairs) + 2 * c.embed_dim * text * c.vocab_size
    if c.patch_codec == "unet":
        from monoformer_jax.models.patch_codec import codec_flops

        return flops + patches * codec_flops(c)
    return flops + 2 * c.embed_dim * patches * (c.layout.patch_dim + c.output_dim)


def recomputed_flops(c: MonoFormerConfig, tokens: int) -> int:
    """FLOPs that the backward pass recomputes (remat)."""
    return c.recomputed_flops(tokens)


def forward(
    c: MonoFormerConfig, params: dict, batch: Batch, x_t: jax.Array, times: jax.Array
) -> Outputs:
    """Runs the model on packed rows.

    Args:
      batch: see `batch.FIELDS`.
      x_t: [B, L, P], input patches, noised where batch["denoise"] is set.
      times: float [B, I], noise level of each image of a row; image i is times[:, i - 1].
    """
    model, layers = _bind(c, params)
    inputs = {**batch, "patches": x_t}
    mask = row_masks(batch, _model_class(c).mask_token_types(c, batch))
    hidden, *image = model.predict(inputs, times, mask, adapters=layers)
    return Outputs(*image, hidden)


def text_head(c: MonoFormerConfig, params: dict) -> jax.Array:
    """Returns the output matrix [D, V] of the logits; columns from vocab_size on are padding."""
    return params["text_head"]


def init_state(c: MonoFormerConfig, rows: int) -> DecodeState:
    """Returns the decoding state of empty sequences."""
    return DecodeState(
        KVCache.create(c, rows, 0),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, c.embed_dim), c.dtype),
    )


def extend(
    c: MonoFormerConfig, params: dict, state: DecodeState, block: Batch, slots: int
) -> DecodeState:
    """Appends a block of the batch contract [B, L] to the sequences; prefill extends an empty state.

    Args:
      block: its images are clean (t = 0). PAD is on the right; a row of only PAD leaves its sequence
        unchanged.
      slots: cache slots of the returned state.
    """
    model, layers = _bind(c, params)
    batch, length = block["tokens"].shape
    mask = attention_mask(c, block)
    real = block["token_types"] != PAD
    stop = mask.stop + state.cache.index
    start = jnp.where(real, state.starts[:, None], stop)
    # All images have noise level 0, so they can share one image id.
    inputs = {
        **block,
        "positions": state.lengths[:, None] + jnp.arange(length),
        "image_ids": jnp.minimum(block["image_ids"], 1),
    }
    cache, mask = state.with_room(length).cache, IntervalMask(start, stop)
    hidden, cache = model(inputs, jnp.zeros((batch, 1)), mask, cache, layers)
    count = real.sum(1)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(count[:, None] > 0, last, state.hidden)
    return DecodeState(cache, state.lengths + length, hidden).truncate(state.lengths + count, slots)


def decode(c: MonoFormerConfig, params: dict, state: DecodeState, tokens: jax.Array) -> DecodeState:
    """Appends one text token, int32 [B], to every sequence; the cache must have a free slot."""
    model, layers = _bind(c, params)
    inputs = text_block(c.layout, tokens[:, None], state.lengths[:, None])
    mask = IntervalMask(state.starts[:, None], jnp.full((len(tokens), 1), state.cache.index + 1))
    hidden, cache = model(inputs, jnp.zeros((len(tokens), 1)), mask, state.cache, layers)
    return DecodeState(cache, state.lengths + 1, hidden[:, 0])


def denoise(
    c: MonoFormerConfig,
    params: dict,
    state: DecodeState,
    grid: tuple[int, int],
    x_t: jax.Array,
    times: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Predicts one denoising step of an image after every sequence; the state is not changed.

    Args:
      state: decoding state; its cache must have free slots for the image.
      grid: height and width of the image in patches.
      x_t: [B, n, P].
      times: float [B], noise level of the image.

    Returns:
      Prediction [B, n, P], and the variance [B, n, P] or None.
    """
    model, layers = _bind(c, params)
    first = c.layout.time_tokens
    inputs = image_block(c.layout, grid, len(x_t))
    inputs["positions"] = inputs["positions"] + state.lengths[:, None]
    inputs["patches"] = jnp.pad(x_t, ((0, 0), (first, 0), (0, 0)))
    stop = state.cache.index + attention_mask(c, inputs).stop
    mask = IntervalMask(jnp.broadcast_to(state.starts[:, None], stop.shape), stop)
    _, prediction, variance = model.predict(inputs, times[:, None], mask, state.cache, layers)
    return prediction[:, first:], None if variance is None else variance[:, first:]


def _bind(c: MonoFormerConfig, params: dict) -> tuple[MonoFormer, dict | None]:
    """Returns the module, and the adapters of its blocks or None."""
    params = dict(params)
    lora = params.pop("lora", None)
    return bind(c, params), None if lora is None else lora["decoder"]["layers"]
