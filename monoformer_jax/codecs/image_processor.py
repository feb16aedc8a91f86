"""Encodes images for prompts and decodes generated images, with a codec or a vision encoder."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import PIL.Image

from monoformer_jax.codecs import open_codec
from monoformer_jax.config import TokenLayout
from monoformer_jax.data.documents import Features, Image, Part
from monoformer_jax.data.image_io import crop, open_image, to_pil, to_pixels
from monoformer_jax.errors import require
from monoformer_jax.nn import clip
from monoformer_jax.pretrained import clip as clip_weights


class ImageProcessor:
    """Encodes images to parts of a prompt and decodes generated images to pixels."""

    def __init__(
        self,
        layout: TokenLayout,
        size: int,
        vae: str | Path | None = None,
        vision: str | Path | None = None,
    ):
        """Args:
        layout: token layout of the model.
        size: side of a generated image or latent, data.image_size.
        vae: folder of the autoencoder, for a latent model.
        vision: folder of the CLIP vision tower, for a model that takes CLIP features as input.

        Raises:
          InputError: an autoencoder or a vision tower that does not fit the model.
        """
        self.layout, self.size = layout, size
        self.codec, self._clip = open_codec(vae, layout.channels), None
        if vision is not None:
            self._clip = c, _ = clip_weights.load(Path(vision))
            require(
                c.width == layout.feature_dim,
                f"vision={vision} has {c.width} features, the model takes {layout.feature_dim}",
            )

    def decode(self, generated: np.ndarray) -> np.ndarray:
        """Decodes generated values [B, h, w, C] to pixels [B, h', w', 1 or 3] in [-1, 1]."""
        self.codec.check()
        return self.codec.decode(generated)

    def crop(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """What the model sees of a picture from `open_image`: `encode` gives the same for both."""
        if self.layout.feature_dim:
            return clip.crop(picture, self._vision[0])
        pixels = crop(picture, self.size * self.codec.factor, self._colours)
        return PIL.Image.fromarray(pixels.squeeze(-1) if self._colours == 1 else pixels)

    def encode(self, source, name: str = "the image") -> Part:
        """Encodes an image (see `image_io.open_image`) to a part of a prompt."""
        picture = open_image(source, name)
        if self.layout.feature_dim:
            c, params = self._vision
            return Features(np.asarray(_features(params, clip.preprocess(picture, c)[None], c))[0])
        self.codec.check()
        pixels = to_pixels(picture, self.size * self.codec.factor, self._colours)
        mean, _ = self.codec.encode(pixels[None])
        return Image(mean[0], denoise=False)

    @property
    def _colours(self) -> int:
        return 1 if self.layout.channels == 1 else 3

    @property
    def _vision(self):
        require(
            self._clip is not None,
            "the model encodes images with a vision encoder: give its folder with vision=FOLDER "
            "(--vision=FOLDER)",
        )
        return self._clip

    def reencode(self, generated: np.ndarray) -> Part:
        """Converts a generated image [h, w, C] to a part of the context of later tokens."""
        if not self.layout.feature_dim:
            return Image(generated, denoise=False)
        return self.encode(to_pil(self.decode(generated[None])[0]))


@functools.partial(jax.jit, static_argnums=2)
def _features(params, pixels, c):
    return clip.bind(c, params).features(pixels)
