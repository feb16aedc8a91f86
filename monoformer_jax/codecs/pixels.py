"""Identity codec for models that generate pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monoformer_jax.errors import require


class Pixels:
    """Codec of a model that generates pixels."""

    class_name = None
    image_size = 32
    factor = 1

    def __init__(self, channels: int):
        self.channels = channels

    @classmethod
    def open(cls, folder: Path | None, channels: int) -> Pixels:
        return cls(channels)

    def check(self) -> None:
        require(
            self.channels in (1, 3),
            f"the model generates latents of {self.channels} channels: give its autoencoder with "
            "vae=FOLDER (--vae=FOLDER)",
        )

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, None]:
        return pixels, None

    def decode(self, generated: np.ndarray) -> np.ndarray:
        return generated
