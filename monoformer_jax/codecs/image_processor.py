"""Pictures as a model sees and generates them: pixels, latents of an autoencoder, or CLIP features."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.config import Config
from monoformer_jax.data.documents import Features, Image, Part
from monoformer_jax.data.image_io import open_image, to_pil, to_pixels
from monoformer_jax.errors import require
from monoformer_jax.nn import autoencoder, clip
from monoformer_jax.pretrained import clip as clip_weights
from monoformer_jax.pretrained import sd_vae


class ImageProcessor:
    """Encodes pictures for a model's prompts and decodes what it generates."""

    def __init__(
        self, config: Config, vae: str | Path | None = None, vision: str | Path | None = None
    ):
        """Args:
        config: of the model.
        vae: folder of the autoencoder, for a model of latents.
        vision: folder of the CLIP vision tower, for a model that takes its features.

        Raises:
          InputError: an autoencoder or a tower that belongs to another model.
        """
        self.config, self.channels = config, config.model.channels
        self._vae = self._clip = None
        if vae is not None:
            self._vae = c, _ = sd_vae.load(Path(vae))
            require(
                c.latent_channels == self.channels,
                f"vae={vae} has latents of {c.latent_channels} channels, the model of "
                f"{self.channels}",
            )
        if vision is not None:
            self._clip = c, _ = clip_weights.load(Path(vision))
            require(
                c.width == config.model.feature_dim,
                f"vision={vision} has {c.width} features, the model takes "
                f"{config.model.feature_dim}",
            )

    @property
    def factor(self) -> int:
        """Pixels along each side of a value that the model generates; 1 without an autoencoder."""
        return 1 if self._vae is None else self._vae[0].factor

    def check_decodable(self) -> None:
        """Raises InputError where what the model generates cannot become a picture."""
        require(
            self._vae is not None or self.channels in (1, 3),
            f"the model generates latents of {self.channels} channels: give its autoencoder with "
            "vae=FOLDER (--vae=FOLDER)",
        )

    def decode(self, generated: np.ndarray) -> np.ndarray:
        """What the model generates, [B, h, w, C], to pixels [B, h', w', 1 or 3] in [-1, 1]."""
        self.check_decodable()
        return generated if self._vae is None else np.asarray(self._decode(jnp.asarray(generated)))

    def encode(self, source, name: str = "the image") -> Part:
        """A picture (see `image_io.open_image`) as a part of a prompt."""
        picture = open_image(source, name)
        if self.config.model.feature_dim:
            require(
                self._clip is not None,
                "the model sees images through a vision encoder: give its folder with "
                "vision=FOLDER (--vision=FOLDER)",
            )
            c, params = self._clip
            return Features(np.asarray(_features(params, clip.preprocess(picture, c)[None], c))[0])
        self.check_decodable()
        size = self.config.data.image_size
        if self._vae is None:
            return Image(to_pixels(picture, size, self.channels), denoise=False)
        c, params = self._vae
        pixels = to_pixels(picture, size * c.factor, 3)[None]
        return Image(np.asarray(_encode(params, pixels, c))[0], denoise=False)

    def reencode(self, generated: np.ndarray) -> Part:
        """A generated image [h, w, C] as a part of the context that follows it."""
        if not self.config.model.feature_dim:
            return Image(generated, denoise=False)
        return self.encode(to_pil(self.decode(generated[None])[0]))

    @functools.cached_property
    def _decode(self):
        c, params = self._vae
        return jax.jit(lambda latents: autoencoder.bind(c, params).decode(latents))


@functools.partial(jax.jit, static_argnums=2)
def _encode(params, pixels, c):
    """The mean of the latents: what an image is, without the noise of training."""
    return autoencoder.bind(c, params).encode(pixels).mean * c.scale


@functools.partial(jax.jit, static_argnums=2)
def _features(params, pixels, c):
    return clip.bind(c, params).features(pixels)
