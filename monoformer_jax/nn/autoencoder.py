"""The Stable Diffusion image autoencoder (AutoencoderKL): pixels to latents and back.

    encode   [B, h, w, 3] in [-1, 1] ─> mean and log-variance [B, h/f, w/f, C]
    decode   latents / scale         ─> [B, h, w, 3]            f = 2 ** (levels - 1), 8 as published

Any height and width that are multiples of f work. Source: Rombach et al. (arXiv 2112.10752); the
layers are those of the published weights, in [B, h, w, C] order.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monoformer_jax.errors import require
from monoformer_jax.nn.layers import full_precision


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The defaults are the published size, 83,653,863 parameters."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level; each next halves the side
    blocks: int = 2  # residual blocks per encoder level; a decoder level has one more
    groups: int = 32  # groups of each GroupNorm
    scale: float = 0.18215  # scales latents to a standard deviation of about 1

    # Per channel, where latents are normalised first; () is a mean of 0 and a deviation of 1.
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            require(
                len(values) in (0, self.latent_channels),
                f"autoencoder {name} has {len(values)} values for {self.latent_channels} channels",
            )
        require(
            all(width % self.groups == 0 for width in self.widths),
            f"autoencoder widths {self.widths} are not multiples of its {self.groups} norm groups",
        )

    @property
    def factor(self) -> int:
        """f, the downsampling factor of each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def channel_scale(self) -> np.ndarray:
        """What latents are multiplied by, float64 [C]."""
        return self.scale / np.array(self.latent_std or [1.0] * self.latent_channels)

    @property
    def channel_mean(self) -> np.ndarray:
        """What is subtracted from latents first, float64 [C]."""
        return np.array(self.latent_mean or [0.0] * self.latent_channels)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Latents [..., C] as the transformer takes them."""
        return (latents - self.channel_mean) * self.channel_scale

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """The inverse of `normalize`."""
        return latents / self.channel_scale + self.channel_mean


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    bound = fan_in**-0.5  # PyTorch's default initialization
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


class Conv(nnx.Module):
    """size × size convolution with bias, [B, h, w, C_in] -> [B, h', w', C_out]."""

    def __init__(self, c_in: int, c_out: int, size: int, rngs: nnx.Rngs, stride: int = 1):
        fan_in = size * size * c_in
        self.kernel = _uniform(rngs, (size, size, c_in, c_out), fan_in)
        self.bias = _uniform(rngs, (c_out,), fan_in)
        self.stride = stride
        # A stride of 2 pads only the bottom and the right, as in training of the published weights.
        self.padding = [(size // 2, size // 2)] * 2 if stride == 1 else [(0, 1)] * 2

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + self.bias[...]


class GroupNorm(nnx.Module):
    """Normalizes over the positions and the channels of a group; eps 1e-6."""

    def __init__(self, channels: int, groups: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = x.reshape(batch, height * width, self.groups, channels // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + 1e-6)
        return y.reshape(x.shape) * self.scale[...] + self.bias[...]


class Residual(nnx.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, c_in: int, c_out: int, groups: int, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(c_in, groups)
        self.conv1 = Conv(c_in, c_out, 3, rngs)
        self.norm2 = GroupNorm(c_out, groups)
        self.conv2 = Conv(c_out, c_out, 3, rngs)
        self.shortcut = Conv(c_in, c_out, 1, rngs) if c_in != c_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Dense(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.kernel = _uniform(rngs, (channels, channels), channels)
        self.bias = _uniform(rngs, (channels,), channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.bias[...]


class SelfAttention(nnx.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.out = (Dense(channels, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = self.q(y), self.k(y), self.v(y)
        weights = jax.nn.softmax(jnp.einsum("BLC,BSC->BLS", q, k) * x.shape[-1] ** -0.5)
        return x + self.out(jnp.einsum("BLS,BSC->BLC", weights, v)).reshape(x.shape)


class Middle(nnx.Module):
    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.first = Residual(channels, channels, groups, rngs)
        self.attention = SelfAttention(channels, groups, rngs)
        self.second = Residual(channels, channels, groups, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.attention(self.first(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, then an optional down- or upsampling convolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, resample: Conv | None,
                 rngs: nnx.Rngs):  # fmt: skip
        sizes = [c_in] + [c_out] * (blocks - 1)
        self.blocks = nnx.List([Residual(size, c_out, groups, rngs) for size in sizes])
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        if self.resample is not None:
            if self.resample.stride == 1:  # upsampling
                x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = self.resample(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        first, last = c.widths[0], c.widths[-1]
        self.conv_in = Conv(c.image_channels, first, 3, rngs)
        levels, before = [], first
        for number, width in enumerate(c.widths, 1):
            halve = Conv(width, width, 3, rngs, stride=2) if number < len(c.widths) else None
            levels.append(Level(before, width, c.blocks, c.groups, halve, rngs))
            before = width
        self.levels = nnx.List(levels)
        self.middle = Middle(last, c.groups, rngs)
        self.norm_out = GroupNorm(last, c.groups)
        self.conv_out = Conv(last, 2 * c.latent_channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        widths = c.widths[::-1]
        self.conv_in = Conv(c.latent_channels, widths[0], 3, rngs)
        self.middle = Middle(widths[0], c.groups, rngs)
        levels, before = [], widths[0]
        for number, width in enumerate(widths, 1):
            double = Conv(width, width, 3, rngs) if number < len(widths) else None
            levels.append(Level(before, width, c.blocks + 1, c.groups, double, rngs))
            before = width
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(widths[-1], c.groups)
        self.conv_out = Conv(widths[-1], c.image_channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


@flax.struct.dataclass
class Moments:
    """Gaussian of an image's unscaled latent, float32 [B, h/f, w/f, C] each."""

    mean: jax.Array
    log_variance: jax.Array

    def sample(self, noise: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class Autoencoder(nnx.Module):
    """See the module docstring; computes in float32, because bfloat16 costs visible detail."""

    def __init__(self, c: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.encoder = Encoder(c, rngs)
        self.quantize = Conv(2 * c.latent_channels, 2 * c.latent_channels, 1, rngs)
        self.unquantize = Conv(c.latent_channels, c.latent_channels, 1, rngs)
        self.decoder = Decoder(c, rngs)

    def encode(self, images: jax.Array) -> Moments:
        """[B, h, w, 3] in [-1, 1] -> moments; h and w are multiples of f."""
        with full_precision(jnp.float32):
            mean, log_variance = jnp.split(self.quantize(self.encoder(images)), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, -30.0, 20.0))

    def latents(self, moments: Moments, noise: jax.Array) -> jax.Array:
        """The transformer's input: a sample, scaled to a standard deviation of about 1."""
        return self.config.normalize(moments.sample(noise))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents [B, h/f, w/f, C] -> images [B, h, w, 3], about [-1, 1]."""
        with full_precision(jnp.float32):
            return self.decoder(self.unquantize(self.config.denormalize(latents)))


def init(c: AutoencoderConfig, key: jax.Array) -> dict:
    """Randomly initialized parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Autoencoder(c, rngs=nnx.Rngs(key)), nnx.Param))


def bind(c: AutoencoderConfig, params: dict) -> Autoencoder:
    """The model with these parameters; nothing is copied or computed."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Autoencoder(c, rngs=nnx.Rngs(0)))), params)
