"""Decodes user images to arrays and converts arrays to images; bad input raises InputError."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from einops import rearrange, repeat

from monoformer_jax.errors import InputError, require

MOST_PIXELS = 1 << 26  # 67 million; decoded, that is 200 MB
_SIDE = 128  # pixels up to which small images in a grid, such as 8×8 digits, are enlarged


def open_image(source, name: str = "the image") -> PIL.Image.Image:
    """Decodes an image to mode L or RGB and center-crops it to an aspect ratio of at most 4:1.

    The EXIF orientation is applied, and transparency is composited on white.

    Args:
      source: a path, bytes, an open binary file, a PIL image, or an array [h, w], [h, w, 1] or
        [h, w, 3] of uint8, or of floats in [-1, 1] (values up to ±1.5 are clipped).
      name: name of the image in error messages.

    Raises:
      InputError: the file does not exist, is not an image, or has more than `MOST_PIXELS`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, str | Path):
        require(Path(source).is_file(), f"{name}: there is no file {source}")
        name = f"{name} ({source})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(source)
            # The size comes from the header, so it is checked before anything is decoded.
            require(
                image.width * image.height <= MOST_PIXELS,
                f"{name} is {image.width}×{image.height}: over {MOST_PIXELS // 10**6} million "
                "pixels, make it smaller",
            )
            image.load()
            return _plain(PIL.ImageOps.exif_transpose(image))
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels, make it smaller") from error
    except InputError:
        raise
    except Exception as error:  # image decoders raise many exception types on corrupt data
        reason = str(error).split("\n")[0][:100]
        raise InputError(f"{name} cannot be read as an image ({reason})") from error


def _plain(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits per pixel
        values = np.asarray(image).astype(np.float64) / 257
        image = PIL.Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        over = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(over, image.convert("RGBA"))
    # Only the center crop is used, and resizing a long strip by its short side would take too much
    # memory.
    most = 4 * min(image.size)
    left, top = (max(side - most, 0) // 2 for side in image.size)
    box = (left, top, left + min(image.width, most), top + min(image.height, most))
    return image.convert("L" if image.mode in ("1", "L") else "RGB").crop(box)


def _from_array(values: np.ndarray, name: str) -> PIL.Image.Image:
    values = values[..., None] if values.ndim == 2 else values
    fits = values.ndim == 3 and values.shape[-1] in (1, 3) and values.size > 0
    require(fits, f"{name} has shape {values.shape}; an image is [height, width, 1 or 3]")
    require(values.size <= 3 * MOST_PIXELS, f"{name} has too many pixels, make it smaller")
    if values.dtype != np.uint8:
        inside = np.issubdtype(values.dtype, np.floating) and np.abs(values).max() <= 1.5
        require(bool(inside), f"{name} is neither uint8 nor floats in [-1, 1]")  # also rejects NaN
        return _plain(to_pil(values))
    return _plain(PIL.Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values))


def crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` and center-crops (as in ADM): float32 [size, size, 3] in
    [-1, 1]."""
    image = image.convert("RGB")
    # Halve with a box filter first, to avoid aliasing.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, PIL.Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image, np.float32)[top : top + size, left : left + size]
    return pixels / 127.5 - 1


def to_pixels(picture: PIL.Image.Image, size: int, channels: int) -> np.ndarray:
    """The center crop as used in training, float32 [size, size, 1 or 3] in [-1, 1]."""
    return crop(picture.convert({1: "L", 3: "RGB"}[channels]), size)[..., :channels]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Maps [-1, 1] to uint8 0 … 255, clipping."""
    return np.clip((np.asarray(images) + 1) * 127.5, 0, 255).round().astype(np.uint8)


def to_pil(image: np.ndarray) -> PIL.Image.Image:
    """Converts float [h, w, 1 or 3] in [-1, 1] to a PIL image, mode L or RGB."""
    pixels = to_uint8(image)
    return PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def image_grid(images: Sequence[np.ndarray], columns: int) -> PIL.Image.Image:
    """Arranges images [h, w, C] of equal size in a grid; small images are enlarged."""
    missing = -len(images) % columns
    images = np.pad(np.asarray(images), ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=-1)
    grid = rearrange(images, "(r c) h w C -> (r h) (c w) C", c=columns)
    scale = max(1, _SIDE // images.shape[2])
    return to_pil(repeat(grid, "h w C -> (h a) (w b) C", a=scale, b=scale))
