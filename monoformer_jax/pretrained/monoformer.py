"""Key table and config.json of the original MonoFormer.

Two layout differences are handled here rather than in the model: the original flattens patches as
(C, ph, pw) but its head's output as (ph, pw, C), so the head's columns are permuted; and its head
interleaves noise and variance, which ours concatenates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from einops import rearrange

from monoformer_jax.errors import require
from monoformer_jax.models import MODELS
from monoformer_jax.pretrained import llama
from monoformer_jax.pretrained.folder import size_field
from monoformer_jax.pretrained.llama import MonoFormerConfig
from monoformer_jax.pretrained.table import Entry, Tensor, transpose

# Timestep conditioning. The other modes of the original raise a shape error in its own code.
_TIME = {"add_before_image_tokens": "token", "adaln_before_decoder": "modulation"}


_FEATURES = "im_embedder.0.weight"
# The frozen vision encoder, which the original's files duplicate; it is loaded from its own folder.
TOWER = r"vision_encoder\..*"
IGNORED = f"{llama.IGNORED}|{TOWER}"


def is_monoformer(values: dict[str, Any]) -> bool:
    return "decoder_t_embed" in values


def feature_dim(tensors: Mapping[str, Tensor]) -> int:
    """Width of the vision encoder's features; 0 if the model has none. config.json does not have it."""
    return tensors[_FEATURES].shape[-1] if _FEATURES in tensors else 0


def latent_side(values: dict[str, Any], where: str | Path) -> int:
    """Height and width of the latents; `image_size` is in pixels, eight times as large."""
    return size_field(values, "image_size", where, 1 << 16) // 8


def read_config(
    values: dict[str, Any], where: str | Path = "config.json", features: int = 0
) -> MonoFormerConfig:
    """The model config; supports every variant that the original's code can run.

    Args:
      features: width of the vision encoder's features, see `feature_dim`.

    Raises:
      InputError: another model type, or an unsupported variant.
    """
    base = llama.read_config(values, where)
    mode = values["decoder_t_embed"]  # see is_monoformer
    require(
        isinstance(mode, str) and mode in _TIME,
        f"{where}: decoder_t_embed={mode!r} fails in the original code too; supported are "
        f"{' and '.join(_TIME)}",
    )
    position = "none"
    if values.get("use_pos_embed", True):
        position = "every_layer" if values.get("add_pos_embed_each_layer") else "input"
    return dataclasses.replace(
        base,
        channels=size_field(values, "in_channels", where, 1024),
        patch_size=size_field(values, "patch_size", where, 256),
        predict_variance=values.get("learn_sigma", True),
        feature_dim=features,
        original=MODELS["monoformer"].OriginalConfig(
            time_conditioning=_TIME[mode],
            image_head="adaln" if values.get("use_adaln_final_layer", True) else "add",
            position_embedding=position,
            context_images="causal",
            bidirectional_images=values.get("use_bi_attn_img_tokens", True),
        ),
    )


def write_config(c: MonoFormerConfig, side: int, max_length: int) -> dict[str, Any]:
    """config.json in the original's format.

    Args:
      side: height and width of the latents.
      max_length: tokens per sequence.

    Raises:
      InputError: the original does not support this model.
    """
    require(
        c.original.context_images == "causal" or not c.feature_dim,
        "the original does not support model.original.context_images='bidirectional' with a vision "
        "encoder: its conditioning images use causal attention",
    )
    require(not c.qk_norm, "the original does not support model.qk_norm=True")
    require(
        c.head_dim * c.num_heads == c.embed_dim,
        f"the original does not support model.head_dim={c.head_dim} with embed_dim={c.embed_dim} "
        f"and num_heads={c.num_heads}: its head_dim is embed_dim / num_heads",
    )
    modes = {ours: theirs for theirs, ours in _TIME.items()}
    values = llama.write_config(c, max_length) | {
        "add_pos_embed_each_layer": c.original.position_embedding == "every_layer",
        "architectures": ["MonoFormer"],
        "decoder_t_embed": modes[c.original.time_conditioning],
        "image_size": 8 * side,
        "image_token_index": c.vocab_size - 3,
        "in_channels": c.channels,
        "learn_sigma": c.predict_variance,
        "patch_size": c.patch_size,
        "tokenizer_max_length": max_length,
        "tokenizer_padding_side": "right",
        "use_adaln_final_layer": c.original.image_head == "adaln",
        "use_bi_attn_img_tokens": c.original.bidirectional_images,
        "use_flash_attn": False,
        "use_pos_embed": c.original.position_embedding != "none",
    }
    if c.feature_dim:
        # The original loads its vision encoder from here. Our config has no key for it: this is the
        # encoder of the paper.
        values["vision_encoder"] = "clip"
        values["vision_encoder_path"] = "openai/clip-vit-large-patch14"
        values["vision_encoder_args"] = {}
    return values


def table(c: MonoFormerConfig) -> list[Entry]:
    """An entry for every parameter of `models.monoformer`."""
    return [*llama.table(c, c.vocab_size), *_image_parts(c)]


def _image_parts(c: MonoFormerConfig) -> Iterator[Entry]:
    yield from _linear("patch_embedding", "x_embedder")
    yield from _linear("time_embedding/hidden", "t_embedder.mlp.0")
    yield from _linear("time_embedding/out", "t_embedder.mlp.2")
    if c.layout.time_tokens:
        yield from _linear("time_token/hidden", "t_projector.0")
        yield from _linear("time_token/out", "t_projector.2")
    else:
        yield from _linear("input_modulation", "adaLN_module.1")
    if c.feature_dim:
        yield from _linear("feature_projector/hidden", "im_embedder.0")
        yield from _linear("feature_projector/out", "im_embedder.2")
    head = "adaLN_modulation" if c.original.image_head == "adaln" else "mlp"
    yield from _linear("image_head/modulation", f"final_layer.{head}.1")
    yield from _head(c)


def _head(c: MonoFormerConfig) -> Iterator[Entry]:
    p, halves = c.patch_size, 2 if c.predict_variance else 1
    theirs, ours = "(p q k C) ...", "(k C p q) ..."
    sizes = {"p": p, "q": p, "k": halves}

    def read(x):
        x = rearrange(x, f"{theirs} -> {ours}", **sizes)
        return x.T

    def write(x):
        return rearrange(x.T, f"{ours} -> {theirs}", **sizes)

    yield Entry("image_head/out/kernel", "final_layer.linear.weight", read, write)
    yield Entry("image_head/out/bias", "final_layer.linear.bias", read, write)


def _linear(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}/kernel", f"{theirs}.weight", transpose, transpose)
    yield Entry(f"{ours}/bias", f"{theirs}.bias")
