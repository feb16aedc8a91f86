"""DiffuSSM: images by diffusion with a gated bidirectional state-space backbone, without attention.

    x_t    the L values of the flattened image or latent; patch_size 1
      └─> linear in -> num_layers hourglass blocks -> adaLN, linear out: prediction, and its variance
    block  I [J, D], J = L / M, k = l mod M          s: GELU; the dense parts have length J, the SSM L
           U = s(W_k^up s(W^0 I)) [L, D]             Y = both directions of S4D(U) [L, 2 D]
           I' = s(W_k^down Y) [J, 2 D]               I + W^3 (s(W^2 I') * s(W^1 I)) [J, D]

Source: arXiv 2311.18257, which has no published code. Where it is silent, this is chosen:

  conditioning  adaLN as in DiT, a scale and shift of each block's normed input (667 M parameters of the
                published 673 M; a gate as well would be 706 M), from the time embedding plus the mean
                embedding of the TEXT tokens before the image in its document, <s> and <|im_start|>
                included; a class is a prompt of one token
  linear in     on the M values of a position of the stream, which has length J between blocks; the same
                out
  position      the 2-D sin-cos embedding of the first value is added: a flattened image does not show
                where its rows end
  s, norm       GELU as in BiGS (arXiv 2212.10544); LayerNorm without parameters as in DiT
  initial       modulations are 0 as in DiT; W^3 is divided by sqrt(2 num_layers) as in our decoder

There is no text head. A packed row gives every image to the backbone as a sequence of `max_patches`; a
smaller image is followed by zeros, which the state-space model does not see. The functions below the
classes implement the model interface, see `models`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from monoformer_jax.batch import PATCH, TEXT, Batch
from monoformer_jax.config import TokenLayout, one_of, positive
from monoformer_jax.errors import InputError, require
from monoformer_jax.models.outputs import Outputs
from monoformer_jax.nn import ssm
from monoformer_jax.nn.conditioning import ImageHead, TimeEmbedding, layer_norm, sincos_2d
from monoformer_jax.nn.config import REMAT_POLICIES
from monoformer_jax.nn.decoder import constrain_activations
from monoformer_jax.nn.layers import Linear, parameter


@dataclasses.dataclass(frozen=True)
class DiffuSSMConfig:
    """Config of the model; `SIZES` holds named sizes."""

    kind: str = "diffussm"
    vocab_size: int = 262  # of the tokenizer; the embedding table is padded to a multiple of 128
    channels: int = 1  # channels of the image or latent
    patch_size: int = 1  # the paper's models have no patches
    max_patches: int = 64  # L, values of the largest image, data.image_size squared
    num_layers: int = 4
    embed_dim: int = 128  # D
    hourglass_ratio: int = 2  # M
    state_size: int = 64  # N, real numbers in the state of a channel and direction
    ssm: str = "auto"  # form of the convolution: "fft", "chunked" or "auto", see nn.ssm
    chunk: int = 128  # of "chunked"
    dtype: str = "bfloat16"  # compute dtype of matrix products; states, norms and losses: float32
    remat: str = (
        "nothing_saveable"  # what a block saves for the backward pass: jax.checkpoint_policies
    )
    predict_variance: bool = False  # set by Config from objective.learn_sigma

    def __post_init__(self):
        positive(self, "model", "vocab_size", "channels", "patch_size", "max_patches", "num_layers",
                 "embed_dim", "hourglass_ratio", "state_size", "chunk")  # fmt: skip
        one_of("model.ssm", self.ssm, ssm.FORMS)
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.remat", self.remat, REMAT_POLICIES)
        for name, unit in (
            ("max_patches", "hourglass_ratio"),
            ("max_patches", "chunk"),
            ("embed_dim", "hourglass_ratio"),
        ):
            size = getattr(self, name)
            of = min(getattr(self, unit), size) if unit == "chunk" else getattr(self, unit)
            require(size % of == 0, f"model.{name}={size} is not a multiple of model.{unit}={of}")
        require(self.state_size % 2 == 0, f"model.state_size={self.state_size} must be even")
        require(
            self.embed_dim % 4 == 0, f"model.embed_dim={self.embed_dim} must be a multiple of 4"
        )

    @property
    def layout(self) -> TokenLayout:
        """Token layout, for data, batches and packing."""
        return TokenLayout(self.vocab_size, self.channels, self.patch_size, time_tokens=0,
                           max_patches=self.max_patches, has_text=False)  # fmt: skip

    @property
    def output_dim(self) -> int:
        """Outputs per patch: P, or 2 P with a predicted variance."""
        return self.layout.patch_dim * (2 if self.predict_variance else 1)


Config = DiffuSSMConfig

# The sizes of the paper for 256 pixels; 512 pixels are max_patches=4096. The table has a token for each
# of the 1000 ImageNet classes, and the special ones.
_LATENT = {"vocab_size": 1024, "channels": 4, "max_patches": 1024, "num_layers": 29}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "embed_dim": 16, "dtype": "float32", "remat": "none"},
    "small": {"num_layers": 4, "embed_dim": 128, "dtype": "float32", "remat": "none"},
    "s": _LATENT | {"embed_dim": 384},
    "l": _LATENT | {"embed_dim": 768},
    "xl": _LATENT | {"embed_dim": 1152},
}


class Block(nnx.Module):
    """[B, J, D] -> [B, J, D]; the module docstring has the equations."""

    def __init__(self, c: DiffuSSMConfig, rngs: nnx.Rngs):
        D, M = c.embed_dim, c.hourglass_ratio
        self.config = c
        self.modulation = Linear(D, 2 * D, ("embed", "embed_out"), rngs=rngs, zero=True)
        self.inner = Linear(D, D, ("embed", "embed_out"), rngs=rngs)  # W^0
        self.up = parameter(rngs, (D, M, D), ("embed", None, "mlp"), D**-0.5)
        self.up_bias = nnx.Param(jnp.zeros(M * D), axes=("mlp",))
        self.ssm = ssm.BidirectionalSSM(D, c.state_size, rngs)
        self.down = parameter(
            rngs, (M, 2, D, 2 * D // M), (None, None, "mlp", "embed"), (2 * D) ** -0.5
        )
        self.down_bias = nnx.Param(jnp.zeros(2 * D), axes=("embed",))
        self.gate = Linear(D, 2 * D, ("embed", "mlp"), rngs=rngs)  # W^1
        self.value = Linear(2 * D, 2 * D, ("embed", "mlp"), rngs=rngs)  # W^2
        self.out = Linear(2 * D, D, ("mlp", "embed"), rngs=rngs)  # W^3
        self.out.kernel[...] = self.out.kernel[...] * (2 * c.num_layers) ** -0.5

    def __call__(self, x: jax.Array, conditioning: jax.Array, real: jax.Array) -> jax.Array:
        """x [B, J, D], conditioning [B, D], real [B, L]: whether a position is one of the image."""
        c, dtype = self.config, x.dtype
        shift, scale = jnp.split(self.modulation(jax.nn.silu(conditioning))[:, None], 2, axis=-1)
        h = layer_norm(x) * (1 + scale) + shift
        up = jnp.einsum("BJD,DME->BJME", jax.nn.gelu(self.inner(h)), self.up[...].astype(dtype))
        up = up + self.up_bias[...].astype(dtype).reshape(up.shape[2:])
        u = rearrange(jax.nn.gelu(up), "B J M E -> B (J M) E") * real[..., None]
        y = self.ssm(u, c.ssm, c.chunk)
        y = rearrange(y, "B (J M) G D -> B J M G D", M=c.hourglass_ratio)
        down = jnp.einsum("BJMGD,MGDE->BJME", y, self.down[...].astype(dtype))
        down = rearrange(down, "B J M E -> B J (M E)") + self.down_bias[...].astype(dtype)
        value = jax.nn.gelu(self.value(jax.nn.gelu(down)))
        return x + self.out(value * jax.nn.gelu(self.gate(h)))


class DiffuSSM(nnx.Module):
    """The complete model; the module docstring shows its structure."""

    def __init__(self, c: DiffuSSMConfig, *, rngs: nnx.Rngs):
        self.config, D, M = c, c.embed_dim, c.hourglass_ratio
        vocab = -(-c.vocab_size // 128) * 128
        self.token_embedding = parameter(rngs, (vocab, D), ("vocab", "embed"), 1.0)
        self.time_embedding = TimeEmbedding(D, rngs)
        self.input = Linear(M * c.layout.patch_dim, D, (None, "embed_out"), rngs=rngs)
        build = nnx.split_rngs(splits=c.num_layers)(nnx.vmap(lambda rngs: Block(c, rngs)))
        self.layers = build(rngs)
        self.head = ImageHead(D, M * c.output_dim, rngs)

    def __call__(
        self, x: jax.Array, text: jax.Array, times: jax.Array, positions: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predicts the objective's target for images.

        Args:
          x: [B, L, P], noised values; arbitrary where `real` is not set.
          text: [B, D], mean embedding of the prompt.
          times: float [B], noise levels.
          positions: int32 [B, L, 2], row and column of each position.
          real: bool [B, L].

        Returns:
          Prediction float32 [B, L, P], and variance [B, L, P] or None.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        conditioning = self.time_embedding(times[:, None], dtype)[:, 0] + text.astype(dtype)
        real, M = real.astype(dtype), c.hourglass_ratio
        h = rearrange(x.astype(dtype) * real[..., None], "B (J M) P -> B J (M P)", M=M)
        h = self.input(h) + sincos_2d(positions[:, ::M], c.embed_dim).astype(dtype)

        def body(h, block):
            return constrain_activations(block(h, conditioning, real)), None

        if c.remat != "none":
            policy = getattr(jax.checkpoint_policies, c.remat)
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        h, _ = jax.lax.scan(body, constrain_activations(h), self.layers)
        out = self.head(h, conditioning[:, None], jnp.ones((*h.shape[:2], 1), dtype))
        out = rearrange(out, "B J (M P) -> B (J M) P", M=M)
        return tuple(jnp.split(out, 2, -1)) if c.predict_variance else (out, None)

    def embed_text(self, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        """Weighted sums of token embeddings: tokens [B, L], weights [B, I, L] -> float32 [B, I, D]."""
        embedded = self.token_embedding[...][tokens]
        return jnp.einsum("BIL,BLD->BID", weights, embedded, preferred_element_type=jnp.float32)


@functools.cache
def _abstract(c: DiffuSSMConfig) -> DiffuSSM:
    return nnx.eval_shape(lambda: DiffuSSM(c, rngs=nnx.Rngs(0)))


def bind(c: DiffuSSMConfig, params: dict) -> DiffuSSM:
    """Returns the nnx module with these parameters, without copying them."""
    return nnx.merge(nnx.graphdef(_abstract(c)), params)


def init(c: DiffuSSMConfig, key: jax.Array) -> dict:
    """Initializes parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(DiffuSSM(c, rngs=nnx.Rngs(key)), nnx.Param))


def logical_axes(c: DiffuSSMConfig) -> dict:
    """Logical axis names of every parameter, in the tree of `init`; stacked ones begin with layers."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(c), nnx.Param)):
        names = variable.get_metadata("axes")
        axes[path] = ("layers",) * (variable.ndim - len(names)) + names
    return nnx.traversals.unflatten_mapping(axes)


FROZEN = ()


def adapters(c: DiffuSSMConfig) -> dict[str, tuple[str, str]]:
    """None: the blocks take no LoRA adapters."""
    return {}


def flops(c: DiffuSSMConfig, *, tokens: int = 0, pairs: int = 0, patches: int = 0, text: int = 0):
    """FLOPs of a forward pass: dense matrix products only, two per multiply-add; (13 / M + 1) D^2
    multiply-adds of a block per patch. The convolutions, see `ssm.flops`, and what is computed once per
    image are not counted.

    Args:
      tokens: number of tokens; its patches are not known, so each counts as one in the blocks.
      patches: number of patches; then only they count, and the heads as well.
      pairs, text: not used.
    """
    D, M = c.embed_dim, c.hourglass_ratio
    block = (13 / M + 1) * D**2
    heads = D * (c.layout.patch_dim + c.output_dim) if patches else 0
    return round(2 * (patches or tokens) * (c.num_layers * block + heads))


def recomputed_flops(c: DiffuSSMConfig, tokens: int) -> int:
    """FLOPs that remat="nothing_saveable" recomputes: all but W^3, which no gradient needs."""
    if c.remat != "nothing_saveable":
        return 0
    last = 2 * tokens * c.num_layers * 2 * c.embed_dim**2 // c.hourglass_ratio
    return flops(c, tokens=tokens) - last


def forward(
    c: DiffuSSMConfig, params: dict, batch: Batch, x_t: jax.Array, times: jax.Array
) -> Outputs:
    """Runs the model on the images of packed rows.

    Args:
      batch: see `batch.FIELDS`.
      x_t: [B, L, P], input patches, noised where batch["denoise"] is set.
      times: float [B, I], noise level of each image of a row; image i is times[:, i - 1].
    """
    model = bind(c, params)
    (rows, length), images, n = batch["tokens"].shape, times.shape[1], c.max_patches
    inside = batch["image_ids"][:, None] == 1 + jnp.arange(images)[:, None]  # [B, I, L]
    inside &= batch["token_types"][:, None] == PATCH
    first, count = inside.argmax(-1), inside.sum(-1)  # [B, I]
    index = jnp.minimum(first[..., None] + jnp.arange(n), length - 1).reshape(rows, -1)

    def gather(x):  # [B, L, …] -> [B · I, n, …]
        taken = jnp.take_along_axis(x, index[..., None], axis=1)
        return taken.reshape(rows * images, n, -1)

    segments = batch["segment_ids"]
    prompt = segments[:, None] == jnp.take_along_axis(segments, first, 1)[..., None]
    prompt &= (batch["token_types"] == TEXT)[:, None] & (count > 0)[..., None]
    prompt &= jnp.arange(length) < first[..., None]
    weights = prompt / jnp.maximum(prompt.sum(-1, keepdims=True), 1)
    text = model.embed_text(batch["tokens"], weights).reshape(rows * images, -1)
    real = (jnp.arange(n) < count[..., None]).reshape(rows * images, n)
    outputs = model(gather(x_t), text, times.reshape(-1), gather(batch["patch_positions"]), real)

    # Back to the tokens: token l of image i is value l - first of it.
    own = jnp.maximum(batch["image_ids"] - 1, 0)
    offset = jnp.arange(length) - jnp.take_along_axis(first, own, 1)
    back = (own * n + jnp.clip(offset, 0, n - 1))[..., None]

    def scatter(x):
        return jnp.take_along_axis(x.reshape(rows, images * n, -1), back, axis=1)

    return Outputs(*(None if x is None else scatter(x) for x in outputs))


def text_head(c: DiffuSSMConfig, params: dict) -> None:
    """There is none."""
    return None


@flax.struct.dataclass
class State:
    """The prompts of B sequences, of a fixed size."""

    lengths: jax.Array  # int32 [B], tokens of each sequence
    hidden: jax.Array  # float32 [B, D], sum of the embeddings of its TEXT tokens
    texts: jax.Array  # int32 [B], their number

    @staticmethod
    def logical_axes() -> State:
        """Logical axis names of the arrays, see `parallel.RULES`."""
        return State(("batch",), ("batch", None), ("batch",))

    def take(self, rows: jax.Array) -> State:
        """Selects sequences by index, int32 [N]."""
        return jax.tree.map(lambda x: x[rows], self)

    def with_room(self, tokens: int) -> State:
        return self

    @staticmethod
    def weave(states: Sequence[State], slots: int) -> State:
        """Interleaves the sequences of several states [B] to [B · states]."""
        return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *states)


def init_state(c: DiffuSSMConfig, rows: int) -> State:
    """Returns the state of empty sequences."""
    zeros = jnp.zeros(rows, jnp.int32)
    return State(zeros, jnp.zeros((rows, c.embed_dim)), zeros)


def extend(c: DiffuSSMConfig, params: dict, state: State, block: Batch, slots: int) -> State:
    """Appends a block of the batch contract [B, L]; only its TEXT tokens matter."""
    is_text = block["token_types"] == TEXT
    weights = is_text[:, None].astype(jnp.float32)
    added = bind(c, params).embed_text(block["tokens"], weights)[:, 0]
    count = (block["segment_ids"] > 0).sum(1)
    return State(state.lengths + count, state.hidden + added, state.texts + is_text.sum(1))


def decode(c: DiffuSSMConfig, params: dict, state: State, tokens: jax.Array) -> State:
    """Raises InputError: there is no text head."""
    raise InputError(f"model.kind={c.kind!r} has no text head: it generates images only")


def denoise(
    c: DiffuSSMConfig,
    params: dict,
    state: State,
    grid: tuple[int, int],
    x_t: jax.Array,
    times: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Predicts one denoising step of an image after every sequence; the state is not changed.

    Args:
      grid: height and width of the image in patches, at most `max_patches` together.
      x_t: [B, n, P].
      times: float [B], noise level of the image.

    Returns:
      Prediction [B, n, P], and the variance [B, n, P] or None.
    """
    rows, n, _ = x_t.shape
    text = state.hidden / jnp.maximum(state.texts, 1)[:, None]
    index = jnp.arange(c.max_patches)
    positions = jnp.stack(jnp.divmod(index, grid[1]), -1)
    real = jnp.broadcast_to(index < n, (rows, c.max_patches))
    x_t = jnp.pad(x_t, ((0, 0), (0, c.max_patches - n), (0, 0)))
    positions = jnp.broadcast_to(positions, (rows, *positions.shape))
    outputs = bind(c, params)(x_t, text, times, positions, real)
    return tuple(None if x is None else x[:, :n] for x in outputs)
