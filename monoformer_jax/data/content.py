"""What a program gives as a prompt or a message: texts, and images in the forms that people use.

    "a text"                                       {"type": "text", "text": "a text"}
    "picture.png", a Path, bytes, a PIL image,     {"type": "image", "image": any of these}
    an array, "data:image/png;base64,…"            {"type": "image_url", "image_url": {"url": "data:…"}}

Nothing is fetched from the network. In a message of `chat`, which may come from others, no string opens
a file: there a path is a `Path`, and `image_url` is a data: URL everywhere.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from monoformer_jax.data.image_io import open_image
from monoformer_jax.errors import InputError, require, shorten

# "a.png", "pictures/a.png" and "~/my pictures/a.png", but not "draw it as in a.png".
_IMAGE_PATH = re.compile(
    r"(?:(?:~|\.{0,2}/).*|\S+)\.(?:png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|heic|ppm)", re.I
)
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")


def read_content(content: Any, name: str, *, paths: bool = True) -> list[str | PIL.Image.Image]:
    """The texts and opened images of a prompt or a message.

    Args:
      content: one of the forms above, or a list of them.
      name: how messages call it, such as "prompt 1".
      paths: whether a string may be the path of an image.

    Raises:
      InputError: another form, an image that cannot be read, or a URL.
    """
    if isinstance(content, list | tuple):
        return [part for one in content for part in _read(one, name, paths, True)]
    return _read(content, name, paths, False)


def _read(part: Any, name: str, paths: bool, in_list: bool) -> list[str | PIL.Image.Image]:
    if isinstance(part, str):
        if not looks_like_image(part):
            return [part]
        if paths:
            return [open_source(part, f"the image of {name}")]
        require(
            not in_list,
            f"{name}: {shorten(part, 60)!r} looks like the path of an image: give a pathlib.Path, or "
            "{'type': 'text', 'text': …} for a text",
        )
        return [part]
    if isinstance(part, Mapping):
        return [_read_mapping(part, name, paths)]
    return [open_source(part, f"the image of {name}")]


def _read_mapping(part: Mapping, name: str, paths: bool) -> str | PIL.Image.Image:
    kind = part.get("type")
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return part["text"]
    if kind in _IMAGES and any(key in part for key in ("image", "image_url")):
        paths &= "image" in part
        source = part["image"] if "image" in part else part["image_url"]
        source = source.get("url") if isinstance(source, Mapping) else source
        require(
            paths or not isinstance(source, str) or source.startswith("data:"),
            f"the image of {name}, {shorten(repr(source), 60)}, is not a data: URL: nothing is "
            "fetched, and a file of this machine is given as a pathlib.Path",
        )
        return open_source(source, f"the image of {name}")
    raise InputError(
        f"{name}: a part with type={kind!r} and the keys {', '.join(map(str, part))} is neither "
        "{'type': 'text', 'text': …} nor {'type': 'image', 'image': …} nor {'type': 'image_url', …}"
    )


def looks_like_image(text: str) -> bool:
    """Whether a text is the path or the URL of an image."""
    return text.startswith("data:image/") or (
        len(text) < 1024 and "\n" not in text and _IMAGE_PATH.fullmatch(text) is not None
    )


def open_source(source: Any, name: str) -> PIL.Image.Image:
    """Opens an image in any form; a string is a path or a data: URL.

    Raises:
      InputError: another form, a URL that would have to be fetched, or see `open_image`.
    """
    if isinstance(source, str):
        if source.startswith("data:"):
            source = _decode_data_url(source, name)
        else:
            require(
                re.match(r"[a-zA-Z][\w+.-]+://", source) is None,
                f"{name} is a URL, {shorten(source, 60)!r}: nothing is fetched, download it or give a "
                "data: URL",
            )
    elif isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif hasattr(source, "__array__") and not isinstance(source, PIL.Image.Image):
        source = np.asarray(source)  # of jax, torch on the CPU, …
    elif not isinstance(source, bytes | os.PathLike | PIL.Image.Image | np.ndarray):
        require(
            hasattr(source, "read"),
            f"{name} is of type {type(source).__name__}: an image is a path, bytes, a PIL image, an "
            "array or a data: URL",
        )
    if isinstance(source, str | os.PathLike):
        source = Path(os.path.expanduser(source))
    return open_image(source, name)


def _decode_data_url(url: str, name: str) -> bytes:
    head, comma, body = url.partition(",")
    require(
        bool(comma) and head.endswith(";base64"),
        f"{name}: a data: URL must have the form data:image/png;base64,…",
    )
    try:
        return base64.b64decode(re.sub(r"\s", "", body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the data: URL is not base64 ({error})") from error
