"""Decodes user images to arrays and converts arrays to images; bad input raises InputError."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from einops import rearrange, repeat
from etils import epath

from monoformer_jax.errors import BadExample, InputError, require

MOST_PIXELS = 1 << 26  # 67 million; decoded, that is 200 MB
_MILLIONS = f"{MOST_PIXELS // 10**6} million"
MOST_STRETCHED = 32  # longest side of an image, in shortest sides
_SIDE = 128  # pixels up to which small images in a grid, such as 8×8 digits, are enlarged


def open_image(
    source, name: str = "the image", formats: Sequence[str] | None = None
) -> PIL.Image.Image:
    """Decodes an image to mode RGB; `np.asarray` of it is uint8 [h, w, 3].

    Every image that comes from outside is opened here, in training as in sampling. The EXIF
    orientation is applied, transparency is composited on white, 16 bits per channel are scaled to 8,
    palettes and CMYK are converted, and an animation gives its first frame.

    Args:
      source: a path, bytes, an open binary file, a PIL image, or an array [h, w], [h, w, 1] or
        [h, w, 3] of uint8, or of floats in [-1, 1] (values up to ±1.5 are clipped).
      name: name of the image in error messages.
      formats: names of the file formats that are read; default: all that Pillow reads.

    Raises:
      InputError: the file does not exist or is not an image, or it has more than `MOST_PIXELS` or a
        side more than `MOST_STRETCHED` times the other, which is read from its header.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        stored = epath.Path(source) if "://" in str(source) else None
        if not (stored.is_file() if stored else os.path.isfile(source)):
            raise BadExample("missing_file", f"{name}: there is no file {source}")
        name = f"{name} ({source})"
        source = io.BytesIO(stored.read_bytes()) if stored else str(source)
    try:
        image = (
            source
            if isinstance(source, PIL.Image.Image)
            else PIL.Image.open(source, formats=formats)
        )
        _check_size(image.width, image.height, name)
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except PIL.Image.DecompressionBombError as error:  # so large that PIL refuses its header
        size = re.search(r"\d+", str(error))
        raise BadExample(
            "picture", f"{name} has {size[0]} pixels: over {_MILLIONS}, make it smaller"
        ) from error
    except InputError as error:
        raise BadExample("picture", str(error)) from error
    except Exception as error:  # image decoders raise many exception types on corrupt data
        reason = str(error).split("\n")[0][:100]
        raise BadExample("picture", f"{name} cannot be read as an image ({reason})") from error


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{name} is {width}×{height} pixels"
    require(width * height <= MOST_PIXELS, f"{size}: over {_MILLIONS}, make it smaller")
    require(
        max(width, height) <= MOST_STRETCHED * min(width, height),
        f"{size}: a side is more than {MOST_STRETCHED} times the other, crop it",
    )


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel
        values = np.asarray(image)
        clear = values == image.info.get("transparency", -1)
        values = np.where(clear, 255, (values / np.float32(257)).clip(0, 255).round())
        image = PIL.Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        over = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(over, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(values: np.ndarray, name: str) -> PIL.Image.Image:
    values = values[..., None] if values.ndim == 2 else values
    fits = values.ndim == 3 and values.shape[-1] in (1, 3) and values.size > 0
    require(fits, f"{name} has shape {values.shape}; an image is [height, width, 1 or 3]")
    _check_size(values.shape[1], values.shape[0], name)
    if values.dtype != np.uint8:
        inside = np.issubdtype(values.dtype, np.floating) and np.abs(values).max() <= 1.5
        require(bool(inside), f"{name} is neither uint8 nor floats in [-1, 1]")  # also rejects NaN
        values = to_uint8(values)
    return PIL.Image.fromarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def crop(image: PIL.Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """Resizes the shorter side to `size` and center-crops (as in ADM): uint8 [size, size, 1 or 3]."""
    image = image.convert("L") if channels == 1 else image
    # Halve with a box filter first, to avoid aliasing.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    if image.size != sides:
        image = image.resize(sides, PIL.Image.BICUBIC)
    if image.size != (size, size):
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).reshape(size, size, channels)


def to_pixels(picture: PIL.Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """The center crop as used in training, float32 [size, size, 1 or 3] in [-1, 1].

    Args:
      picture: from `open_image`.
    """
    return from_uint8(crop(picture, size, channels))


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """Maps uint8 0 … 255 to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


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
