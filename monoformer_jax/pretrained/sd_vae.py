"""Key table and config.json of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monoformer_jax.errors import require, whole_number
from monoformer_jax.nn import autoencoder
from monoformer_jax.nn.autoencoder import AutoencoderConfig
from monoformer_jax.pretrained.folder import load_folder, size_field
from monoformer_jax.pretrained.table import Entry, transpose


def read_config(values: dict[str, Any], where: str | Path = "config.json") -> AutoencoderConfig:
    """The config of an AutoencoderKL; raises InputError if the model is not supported."""
    kinds = {*values.get("down_block_types", ()), *values.get("up_block_types", ())}
    require(
        "block_out_channels" in values and kinds == {"DownEncoderBlock2D", "UpDecoderBlock2D"},
        f"{where} is not the config of an AutoencoderKL with DownEncoderBlock2D and "
        "UpDecoderBlock2D blocks",
    )
    require(values.get("act_fn", "silu") == "silu", f"{where}: act_fn must be silu")
    require(
        values["in_channels"] == values["out_channels"],
        f"{where}: in_channels and out_channels differ",
    )
    channels = size_field(values, "latent_channels", where, 1024)
    widths = values["block_out_channels"]
    require(
        isinstance(widths, list) and 0 < len(widths) <= 16,
        f"{where}: block_out_channels is not a list of 1 to 16 sizes",
    )
    mean = values.get("latents_mean") or [values.get("shift_factor") or 0.0] * channels
    return AutoencoderConfig(
        image_channels=size_field(values, "in_channels", where, 1024),
        latent_channels=channels,
        widths=tuple(whole_number(x, f"{where}: block_out_channels", 1, 1 << 16) for x in widths),
        blocks=size_field(values, "layers_per_block", where, 16),
        groups=size_field(values, "norm_num_groups", where),
        scale=float(values.get("scaling_factor", 0.18215)),
        latent_mean=tuple(mean) if any(mean) else (),
        latent_std=tuple(values.get("latents_std") or ()),
    )


def write_config(c: AutoencoderConfig) -> dict[str, Any]:
    levels = len(c.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(c.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": c.image_channels,
        "latent_channels": c.latent_channels,
        "latents_mean": list(c.latent_mean) or None,
        "latents_std": list(c.latent_std) or None,
        "layers_per_block": c.blocks,
        "norm_num_groups": c.groups,
        "out_channels": c.image_channels,
        "scaling_factor": c.scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def load(folder: Path) -> tuple[AutoencoderConfig, dict]:
    """The config and the parameters of the autoencoder in a folder.

    Raises:
      InputError: see `folder.open_weights`, `read_config` and `table.open_tree`.
    """
    return load_folder(folder, read_config, autoencoder.init, table)


def table(c: AutoencoderConfig) -> list[Entry]:
    """An entry for every parameter of `autoencoder.init`."""
    entries = [
        *_conv("quantize", "quant_conv"),
        *_conv("unquantize", "post_quant_conv"),
        *_half("encoder", "down_blocks", "downsamplers", c.widths, c.blocks),
        *_half("decoder", "up_blocks", "upsamplers", c.widths[::-1], c.blocks + 1),
    ]
    return entries


def _half(half, levels, resamplers, widths, blocks) -> Iterator[Entry]:
    yield from _conv(f"{half}/conv_in", f"{half}.conv_in")
    before = widths[0]
    for i, width in enumerate(widths):
        ours, theirs = f"{half}/levels/{i}", f"{half}.{levels}.{i}"
        for j in range(blocks):
            grows = j == 0 and before != width
            yield from _residual(f"{ours}/blocks/{j}", f"{theirs}.resnets.{j}", grows)
        if i + 1 < len(widths):
            yield from _conv(f"{ours}/resample", f"{theirs}.{resamplers}.0.conv")
        before = width
    yield from _residual(f"{half}/middle/first", f"{half}.mid_block.resnets.0", False)
    yield from _attention(f"{half}/middle/attention", f"{half}.mid_block.attentions.0")
    yield from _residual(f"{half}/middle/second", f"{half}.mid_block.resnets.1", False)
    yield from _norm(f"{half}/norm_out", f"{half}.conv_norm_out")
    yield from _conv(f"{half}/conv_out", f"{half}.conv_out")


def _residual(ours, theirs, shortcut: bool) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(f"{ours}/norm{i}", f"{theirs}.norm{i}")
        yield from _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
    if shortcut:
        yield from _conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")


def _attention(ours, theirs) -> Iterator[Entry]:
    yield from _norm(f"{ours}/norm", f"{theirs}.group_norm")
    # The published file has the names of older diffusers versions.
    names = {"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"),
             "out": ("to_out.0", "proj_attn")}  # fmt: skip
    for part, (name, old) in names.items():
        yield Entry(
            f"{ours}/{part}/kernel", f"{theirs}.{name}.weight", transpose, transpose,
            f"{theirs}.{old}.weight",
        )  # fmt: skip
        yield Entry(f"{ours}/{part}/bias", f"{theirs}.{name}.bias", alias=f"{theirs}.{old}.bias")


def _norm(ours, theirs) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", f"{theirs}.weight")
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _conv(ours, theirs) -> Iterator[Entry]:
    def read(x):
        return x.transpose(2, 3, 1, 0)  # out, in, h, w -> h, w, in, out

    def write(x):
        return x.transpose(3, 2, 0, 1)

    yield Entry(f"{ours}/kernel", f"{theirs}.weight", read, write)
    yield Entry(f"{ours}/bias", f"{theirs}.bias")
