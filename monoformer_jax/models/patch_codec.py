"""The U-Net patch codec: `model.patch_codec="unet"`, in place of a linear layer on each side.

    x_t [h, w, C] ─ conv ─ block ─ down ─ block ─ … ─ block ─ linear ─> patch vectors [h/p · w/p, D]
                             └ skip         └ skip        └ skip             │ decoder
    prediction   <─ conv ─ block ─  up  ─ block ─ … ─ block ─ linear <───────┘

A level halves the sides: a patch of 2, 4 or 8 has one, two or three of them below the first. `down` is
a linear layer on 2×2 values, `up` its inverse. A block is two 3×3 convolutions with LayerNorm over the
channels, whose second is scaled and shifted by the noise level (adaLN); on the way up it also sees the
skip of its level. Nothing leaves an image: values outside it are 0 before every convolution, and no
norm has statistics over positions, so a packed image of any shape is computed as it would be alone.

Source: section 3.2 of arXiv 2408.11039, which has no published code; the norm is that of ConvNeXt
(arXiv 2201.03545), since a GroupNorm averages over the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from monoformer_jax.batch import PATCH
from monoformer_jax.models.monoformer import MonoFormer, MonoFormerConfig
from monoformer_jax.nn.conditioning import layer_norm
from monoformer_jax.nn.layers import Linear, parameter


class Slots:
    """The images of packed rows as grids of side² patches, I slots a row: static shapes.

    Attributes:
      real: bool [B·I, side, side], the cells that are patches of the image.
    """

    def __init__(self, inputs: Mapping[str, jax.Array], images: int, side: int):
        """Args:
        inputs: token_types, image_ids [B, L] and patch_positions [B, L, 2] of the batch contract.
        images: I; image i of a row is in slot i - 1.
        side: most patches of a side of an image.
        """
        ids, positions = inputs["image_ids"], inputs["patch_positions"]
        length = ids.shape[1]
        inside = ids[:, None] == 1 + jnp.arange(images)[:, None]
        inside &= (inputs["token_types"] == PATCH)[:, None]  # [B, I, L]
        size = 1 + jnp.where(inside[..., None], positions[:, None], -1).max(2)  # [B, I, 2]
        row, column = jnp.indices((side, side))
        height, width = (size[..., i, None, None] for i in (0, 1))
        real = (row < height) & (column < width)  # [B, I, side, side]
        index = inside.argmax(-1)[..., None, None] + row * width + column
        self._index = jnp.minimum(index, length - 1).reshape(len(ids), -1, 1)
        own = jnp.clip(ids - 1, 0, images - 1) * side + positions[..., 0]
        self._back = jnp.minimum(own * side + positions[..., 1], images * side**2 - 1)[..., None]
        self._side, self.real = side, rearrange(real, "B I h w -> (B I) h w")

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, L, F] -> [B·I, side, side, F], 0 outside the images."""
        taken = jnp.take_along_axis(x, self._index, axis=1)
        taken = rearrange(taken, "B (I h w) F -> (B I) h w F", h=self._side, w=self._side)
        return taken * self.real[..., None].astype(x.dtype)

    def scatter(self, y: jax.Array) -> jax.Array:
        """[B·I, side, side, F] -> [B, L, F], valid at PATCH tokens only."""
        y = rearrange(y, "(B I) h w F -> B (I h w) F", B=len(self._back))
        return jnp.take_along_axis(y, self._back, axis=1)

    def masks(self, levels: int, dtype) -> list[jax.Array]:
        """The real values of each level, the finest first: [B·I, h, w, 1]; the last are patches."""
        sizes = [2**n for n in range(levels, -1, -1)]
        real = self.real.astype(dtype)
        return [repeat(real, "N h w -> N (h p) (w q) 1", p=p, q=p) for p in sizes]


class Conv(nnx.Module):
    """3×3 convolution over images [N, h, w, C_in] that are 0 outside; bias."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs, *, scale: float = 1.0, last=False):
        # fsdp shards the side that is not the channels of an image.
        axes = (None, None, *(("embed", None) if last else (None, "embed")))
        stddev = scale * (9 * d_in) ** -0.5
        self.kernel = parameter(rngs, (3, 3, d_in, d_out), axes, stddev)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=(axes[-1],))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + self.bias[...].astype(x.dtype)


class ResBlock(nnx.Module):
    """[N, h, w, d_in] -> [N, h, w, d_out], modulated by the noise level; see the module docstring."""

    def __init__(self, d_in: int, d_out: int, dim: int, rngs: nnx.Rngs):
        self.first = Conv(d_in, d_out, rngs)
        self.modulation = Linear(dim, 2 * d_out, ("embed", None), rngs=rngs)
        self.second = Conv(d_out, d_out, rngs, scale=0.1)  # near the identity at the start
        if d_in != d_out:
            self.skip = Linear(d_in, d_out, (None, "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, embedding: jax.Array, real: jax.Array) -> jax.Array:
        """embedding [N, D], time embeddings of the images; real [N, h, w, 1], 0 outside them."""
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedding))[:, None, None], 2, -1)
        y = self.first(jax.nn.silu(layer_norm(x)) * real)
        y = layer_norm(y) * (1 + scale) + shift
        y = self.second(jax.nn.silu(y) * real)
        return y + (self.skip(x) if hasattr(self, "skip") else x)


def widths(c: MonoFormerConfig) -> list[int]:
    """Channels of each level, the finest first: codec_dim, then twice as many."""
    return [c.codec_dim, *[2 * c.codec_dim] * (c.patch_size.bit_length() - 1)]


class Encoder(nnx.Module):
    """Images [N, h, w, C] -> patch vectors [N, h/p, w/p, D], and the skips of the levels."""

    def __init__(self, c: MonoFormerConfig, rngs: nnx.Rngs):
        W, D, self.count = widths(c), c.embed_dim, c.codec_blocks
        self.input = Conv(c.channels, W[0], rngs)
        for level, w in enumerate(W):
            for n in range(self.count):
                setattr(self, f"block_{level}_{n}", ResBlock(w, w, D, rngs))
            if level:
                down = Linear(4 * W[level - 1], w, (None, "embed"), rngs=rngs)
                setattr(self, f"down_{level}", down)
        self.out = Linear(W[-1], D, ("embed", "embed_out"), rngs=rngs)

    def __call__(
        self, x: jax.Array, embedding: jax.Array, masks: Sequence[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """masks: see `Slots.masks`."""
        x, skips = self.input(x), []
        for level, real in enumerate(masks):
            if level:
                x = rearrange(x, "N (h p) (w q) C -> N h w (p q C)", p=2, q=2)
                x = getattr(self, f"down_{level}")(x)
            for n in range(self.count):
                x = getattr(self, f"block_{level}_{n}")(x, embedding, real)
            skips.append(x)
        return self.out(layer_norm(x)), skips


class Decoder(nnx.Module):
    """Hidden states [N, h/p, w/p, D] and skips -> float32 [N, h, w, outputs]."""

    def __init__(self, c: MonoFormerConfig, outputs: int, rngs: nnx.Rngs):
        W, D, self.count = widths(c), c.embed_dim, c.codec_blocks
        self.input = Linear(D, W[-1], ("embed", None), rngs=rngs)
        for level, w in enumerate(W):
            for n in range(c.codec_blocks):
                setattr(self, f"block_{level}_{n}", ResBlock(w if n else 2 * w, w, D, rngs))
            if level:
                up = Linear(w, 4 * W[level - 1], ("embed", None), rngs=rngs)
                setattr(self, f"up_{level}", up)
        scale = 0.0 if c.zero_image_head else 1.0
        self.out = Conv(W[0], outputs, rngs, scale=scale, last=True)

    def __call__(
        self,
        x: jax.Array,
        embedding: jax.Array,
        skips: Sequence[jax.Array],
        masks: Sequence[jax.Array],
    ) -> jax.Array:
        x = self.input(layer_norm(x))
        for level in range(len(skips) - 1, -1, -1):
            x = jnp.concatenate([x, skips[level]], -1)
            for n in range(self.count):
                x = getattr(self, f"block_{level}_{n}")(x, embedding, masks[level])
            if level:
                x = getattr(self, f"up_{level}")(x)
                x = rearrange(x, "N h w (p q C) -> N (h p) (w q) C", p=2, q=2)
        return self.out((jax.nn.silu(layer_norm(x)) * masks[0]).astype(jnp.float32))


class UNetMonoFormer(MonoFormer):
    """MonoFormer whose patches are encoded and decoded by a U-Net."""

    def make_patch_embedding(self, rngs):
        return Encoder(self.config, rngs)

    def make_image_head(self, rngs):
        c = self.config
        return Decoder(c, c.output_dim // c.patch_size**2, rngs)

    def _encode(self, inputs, embedding):
        """Patch vectors [B, L, D] of images with time embeddings [B, I, D], and what decoding needs."""
        c, images = self.config, embedding.shape[1]
        slots = Slots(inputs, images, c.side)
        masks = slots.masks(c.patch_size.bit_length() - 1, embedding.dtype)
        x = slots.gather(inputs["patches"].astype(embedding.dtype))
        x = rearrange(x, "N h w (C p q) -> N (h p) (w q) C", p=c.patch_size, q=c.patch_size)
        of_slots = rearrange(embedding, "B I D -> (B I) D")
        vectors, skips = self.patch_embedding(x, of_slots, masks)
        return slots.scatter(vectors), (slots, of_slots, skips, masks)

    def embed_patches(self, inputs, embedding, image_of):
        position = self.position(inputs, embedding.dtype)
        if "patch_vectors" in inputs:
            return inputs["patch_vectors"] + position
        return self._encode_one_by_one(inputs, embedding) + position

    def _encode_one_by_one(self, inputs, embedding):
        """Patch vectors of any number of images, for a cache: none costs nothing, and none is skipped
        for lack of a slot. Not differentiable."""
        is_patch = inputs["token_types"] == PATCH
        begins = is_patch & (inputs["patch_positions"] == 0).all(-1)
        number = jnp.cumsum(begins, 1) * is_patch  # from 1, whatever the image ids are
        # A vision encoder embeds the images of a cache.
        count = 0 if self.config.feature_dim else number.max()

        def encode(k, vectors):
            here = number == k
            owner = jnp.where(here, inputs["image_ids"], 1).max(1) - 1
            of_image = jnp.take_along_axis(embedding, owner[:, None, None], axis=1)
            made, _ = self._encode({**inputs, "image_ids": here.astype(jnp.int32)}, of_image)
            return jnp.where(here[..., None], made, vectors)

        empty = jnp.zeros((*number.shape, self.config.embed_dim), embedding.dtype)
        return jax.lax.fori_loop(1, count + 1, encode, empty)

    def predict(self, inputs, times, mask, cache=None, adapters=None):
        c = self.config
        embedding = self.time_embedding(times, jnp.dtype(c.dtype))
        vectors, (slots, of_slots, skips, masks) = self._encode(inputs, embedding)
        hidden, _ = self({**inputs, "patch_vectors": vectors}, times, mask, cache, adapters)
        out = self.image_head(slots.gather(hidden), of_slots, skips, masks)
        p = c.patch_size
        parts = jnp.split(out, 2, -1) if c.predict_variance else [out]
        found = [rearrange(x, "N (h p) (w q) C -> N h w (C p q)", p=p, q=p) for x in parts]
        found = [slots.scatter(x) for x in found]
        return hidden, found[0], found[1] if c.predict_variance else None


def codec_flops(c: MonoFormerConfig) -> int:
    """FLOPs of encoding and decoding a patch: matrix products only, two per multiply-add."""
    return 2 * sum(_products(c))


def _products(c: MonoFormerConfig) -> Iterator[int]:
    W, outputs = widths(c), c.output_dim // c.patch_size**2
    for level, w in enumerate(W):
        values = (c.patch_size >> level) ** 2  # of a patch, at this level
        yield values * c.codec_blocks * 18 * w * w  # down
        yield values * (c.codec_blocks * 18 + 9 + 2) * w * w  # up, with the skip beside the input
        if level == 0:
            yield values * 9 * w * (c.channels + outputs)
        else:
            yield 2 * values * 4 * W[level - 1] * w
    yield 2 * c.embed_dim * W[-1]
