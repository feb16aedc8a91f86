"""Pictures of conversations as PNG files that say how they were made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin

_SIDE = 128  # pixels up to which small pictures, such as 8×8 digits, are enlarged


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a conversation.

    Attributes:
      path: its PNG file.
      caption: what is shown below it, such as its seed.
    """

    path: Path
    caption: str


def save_picture(path: Path, image: PIL.Image.Image, parameters: str = "") -> None:
    """Writes a PNG, small pictures enlarged by a whole number.

    Args:
      parameters: stored as the PNG text "parameters", where A1111 and its successors look for it.
    """
    scale = max(1, _SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)
    texts = PIL.PngImagePlugin.PngInfo()
    if parameters:
        texts.add_text("parameters", parameters)
    image.save(path, "PNG", pnginfo=texts)


def describe(
    prompt: str,
    sampling: Mapping[str, Any],
    *,
    seed: int,
    size: tuple[int, int],
    model: str,
    earlier: int,
) -> str:
    """How a picture was made, in the form of A1111's infotext.

    Args:
      prompt: the texts of the message.
      sampling: the values of `SamplingConfig`.
      size: width and height in pixels.
      model: name of the model and step of its checkpoint.
      earlier: number of earlier messages that the model was shown.
    """
    values = {
        "Steps": sampling["steps"],
        "Sampler": sampling["solver"].capitalize(),
        "CFG scale": sampling["guidance"],
        "Image CFG scale": sampling["image_guidance"],
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
        "Earlier messages": earlier,
    }
    lines = [prompt]
    if sampling["negative_prompt"]:
        lines.append(f"Negative prompt: {sampling['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """Values with a separator are quoted, as A1111 writes and reads them."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; others may delete files meanwhile."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(here, name)).st_size
            except FileNotFoundError:
                continue
    return total
