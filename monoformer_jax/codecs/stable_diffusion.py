"""Latents of Stable Diffusion's autoencoder, normalised per channel."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from monoformer_jax.errors import require
from monoformer_jax.nn import autoencoder
from monoformer_jax.pretrained import sd_vae


class StableDiffusion:
    """Codec of a model that generates latents: (latent - mean) * scale, see `AutoencoderConfig`."""

    class_name = "AutoencoderKL"
    image_size = 256

    def __init__(self, config: autoencoder.AutoencoderConfig, params: dict):
        self.config, self.params = config, params
        self.factor, self.channels = config.factor, config.latent_channels

    @classmethod
    def open(cls, folder: Path, channels: int | None) -> StableDiffusion:
        config, params = sd_vae.load(folder)
        require(
            channels in (None, config.latent_channels),
            f"vae={folder} has latents of {config.latent_channels} channels, the model has {channels}",
        )
        return cls(config, params)

    def check(self) -> None:
        """Does nothing: latents can always be decoded."""

    def encode(self, pixels: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """`pixels` may be sharded over devices by images; the weights are then copied to each, once."""
        if isinstance(pixels, jax.Array) and isinstance(pixels.sharding, NamedSharding):
            everywhere = NamedSharding(pixels.sharding.mesh, PartitionSpec())
            self.params = jax.device_put(self.params, everywhere)
        return tuple(map(np.asarray, _encode(self.params, pixels, self.config)))

    def decode(self, generated: np.ndarray) -> np.ndarray:
        return np.asarray(_decode(self.params, jnp.asarray(generated), self.config))


@functools.partial(jax.jit, static_argnums=2)
def _encode(params, pixels, c):
    moments = autoencoder.bind(c, params).encode(pixels)
    return c.normalize(moments.mean), moments.log_variance + 2 * np.log(c.channel_scale)


@functools.partial(jax.jit, static_argnums=2)
def _decode(params, latents, c):
    return autoencoder.bind(c, params).decode(latents)
