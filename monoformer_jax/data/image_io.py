"""Pictures of people to arrays and back; whatever they give, it ends as a picture or a sentence."""

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
_SIDE = 128  # pixels that a picture in a grid has at least, or 8×8 digits would be specks


def open_image(source, name: str = "the image") -> PIL.Image.Image:
    """A picture, decoded and upright, mode L or RGB, transparency on white, a strip cut to 4 : 1.

    Args:
      source: a path, bytes, an open binary file, a PIL image, or an array [h, w], [h, w, 1] or
        [h, w, 3] of uint8, or of floats in [-1, 1].
      name: of the picture in messages.

    Raises:
      InputError: no such file, nothing that can be read, or more than `MOST_PIXELS`.
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
            picture = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(source)
            # The size stands in the header: nothing is decoded before it is checked.
            require(
                picture.width * picture.height <= MOST_PIXELS,
                f"{name} is {picture.width}×{picture.height}: over {MOST_PIXELS // 10**6} million "
                "pixels, make it smaller",
            )
            picture.load()
            return _plain(PIL.ImageOps.exif_transpose(picture))
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels, make it smaller") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever the broken part raised
        reason = str(error).split("\n")[0][:100]
        raise InputError(f"{name} is no picture that can be read ({reason})") from error


def _plain(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # 16 bits a pixel
        values = np.asarray(picture).astype(np.float64) / 257
        picture = PIL.Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        over = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(over, picture.convert("RGBA"))
    # Only the centre is ever looked at, and resizing a strip by its short side would be a bomb.
    most = 4 * min(picture.size)
    left, top = (max(side - most, 0) // 2 for side in picture.size)
    box = (left, top, left + min(picture.width, most), top + min(picture.height, most))
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB").crop(box)


def _from_array(values: np.ndarray, name: str) -> PIL.Image.Image:
    values = values[..., None] if values.ndim == 2 else values
    fits = values.ndim == 3 and values.shape[-1] in (1, 3) and values.size > 0
    require(fits, f"{name} has shape {values.shape}; an image is [height, width, 1 or 3]")
    require(values.size <= 3 * MOST_PIXELS, f"{name} has too many pixels, make it smaller")
    if values.dtype != np.uint8:
        inside = np.issubdtype(values.dtype, np.floating) and np.abs(values).max() <= 1.5
        require(bool(inside), f"{name} is neither uint8 nor floats in [-1, 1]")  # and no NaN
        return _plain(to_pil(values))
    return _plain(PIL.Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values))


def crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Float32 [size, size, 3] in [-1, 1]: the centre, its shorter side made `size` (as in ADM)."""
    image = image.convert("RGB")
    # Whole halvings first, by averaging, so that nothing aliases.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, PIL.Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image, np.float32)[top : top + size, left : left + size]
    return pixels / 127.5 - 1


def to_pixels(picture: PIL.Image.Image, size: int, channels: int) -> np.ndarray:
    """Float32 [size, size, 1 or 3] in [-1, 1]: the centre of the picture, as training sees it."""
    return crop(picture.convert({1: "L", 3: "RGB"}[channels]), size)[..., :channels]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 … 255."""
    return np.clip((np.asarray(images) + 1) * 127.5, 0, 255).round().astype(np.uint8)


def to_pil(image: np.ndarray) -> PIL.Image.Image:
    """Float [h, w, 1 or 3] in [-1, 1] to a picture, mode L or RGB."""
    pixels = to_uint8(image)
    return PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def image_grid(images: Sequence[np.ndarray], columns: int) -> PIL.Image.Image:
    """Images [h, w, C] of one size as one picture of rows, small ones enlarged."""
    missing = -len(images) % columns
    images = np.pad(np.asarray(images), ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=-1)
    grid = rearrange(images, "(r c) h w C -> (r h) (c w) C", c=columns)
    scale = max(1, _SIDE // images.shape[2])
    return to_pil(repeat(grid, "h w C -> (h a) (w b) C", a=scale, b=scale))
