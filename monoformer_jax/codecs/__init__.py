"""Image codecs between pixels and the values that a model generates, registered in `IMAGE_CODECS`.

A codec has

    image_size                         side of a picture in pixels, unless the user gives one
    factor                             downsampling factor: pixels per latent value along each side
    channels                           channels of the generated values
    check()                            raises InputError if it cannot decode to pixels
    encode(pixels [B, h, w, 1 or 3]) -> mean, log-variance or None, [B, h/factor, w/factor, channels]
    decode(generated) -> pixels        [B, h, w, 1 or 3], in about [-1, 1]

and is constructed by `open(folder, channels or None)`. `class_name` of the codec is `_class_name` in
the config.json of its folder, which selects it; None: the codec has no folder.
"""

from __future__ import annotations

from pathlib import Path

from monoformer_jax.codecs.pixels import Pixels
from monoformer_jax.codecs.stable_diffusion import StableDiffusion
from monoformer_jax.errors import require
from monoformer_jax.pretrained.folder import read_json

# Name in `prepare_data --codec` -> codec.
IMAGE_CODECS = {"pixels": Pixels, "sd_vae": StableDiffusion}


def open_codec(folder: str | Path | None, channels: int | None = None):
    """Opens the codec of a folder; without a folder, the pixel codec.

    Args:
      channels: channels that the model generates, if there is a model.

    Raises:
      InputError: no such folder, an unknown codec, or another number of channels.
    """
    codecs = {codec.class_name: codec for codec in IMAGE_CODECS.values()}
    if folder is None:
        return codecs[None].open(None, channels)
    folder = Path(folder)
    require(folder.is_dir(), f"{folder} is not a folder")
    name = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    known = ", ".join(kind for kind in codecs if kind)
    require(
        name in codecs,
        f"{folder}: _class_name {name!r} is not an image codec; choose from {known}",
    )
    return codecs[name].open(folder, channels)
