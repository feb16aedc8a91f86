"""Key tables of transformers' CLIPVisionModel and CLIPModel, and their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from einops import rearrange

from monoformer_jax.errors import require
from monoformer_jax.nn import clip
from monoformer_jax.nn.clip import ClipConfig, ClipTextConfig, DualConfig
from monoformer_jax.pretrained.folder import load_folder, size_field
from monoformer_jax.pretrained.table import Entry, transpose

# The text model and projections of a full CLIP, and a buffer of older transformers versions.
_BUFFERS = r"logit_scale|.*\.position_ids"
IGNORED = r"text_model\..*|.*_projection\.weight|" + _BUFFERS


def read_config(values: dict[str, Any], where: str | Path = "config.json") -> ClipConfig:
    """The config of a CLIP vision model, alone or inside a full CLIP.

    Raises:
      InputError: another model type, or an unsupported variant.
    """
    values = values.get("vision_config", values)
    require(
        values.get("model_type") == "clip_vision_model",
        f"{where}: model_type {values.get('model_type')!r} is not clip_vision_model",
    )
    _check_activation(values, where)
    require(values.get("num_channels", 3) == 3, f"{where}: num_channels must be 3")
    return ClipConfig(
        width=size_field(values, "hidden_size", where),
        mlp_dim=size_field(values, "intermediate_size", where),
        num_layers=size_field(values, "num_hidden_layers", where, 1000),
        num_heads=size_field(values, "num_attention_heads", where),
        patch_size=size_field(values, "patch_size", where, 4096),
        image_size=size_field(values, "image_size", where, 4096),
        norm_eps=float(values.get("layer_norm_eps", 1e-5)),
    )


def read_dual_config(values: dict[str, Any], where: str | Path = "config.json") -> DualConfig:
    """The config of a complete CLIP, with both encoders.

    Raises:
      InputError: another model type, or an unsupported variant.
    """
    require(
        values.get("model_type") == "clip",
        f"{where}: model_type {values.get('model_type')!r} is not clip, a model with a text encoder",
    )
    text = values["text_config"]
    _check_activation(text, where)
    return DualConfig(
        read_config(values, where),
        ClipTextConfig(
            width=size_field(text, "hidden_size", where),
            mlp_dim=size_field(text, "intermediate_size", where),
            num_layers=size_field(text, "num_hidden_layers", where, 1000),
            num_heads=size_field(text, "num_attention_heads", where),
            vocab_size=size_field(text, "vocab_size", where),
            max_tokens=size_field(text, "max_position_embeddings", where, 4096),
            norm_eps=float(text.get("layer_norm_eps", 1e-5)),
        ),
        size_field(values, "projection_dim", where),
    )


def _check_activation(values: dict[str, Any], where: str | Path) -> None:
    act = values.get("hidden_act", "quick_gelu")
    require(act == "quick_gelu", f"{where}: hidden_act must be quick_gelu, not {act!r}")


def write_config(c: ClipConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": c.width,
        "image_size": c.image_size,
        "intermediate_size": c.mlp_dim,
        "layer_norm_eps": c.norm_eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": c.num_heads,
        "num_channels": 3,
        "num_hidden_layers": c.num_layers,
        "patch_size": c.patch_size,
    }


def load(folder: Path) -> tuple[ClipConfig, dict]:
    """The config and the parameters of the vision model in a folder.

    Raises:
      InputError: see `folder.open_weights`, `read_config` and `table.open_tree`.
    """
    return load_folder(folder, read_config, clip.init, table, ignored=IGNORED)


def load_dual(folder: Path) -> tuple[DualConfig, dict]:
    """The config and the parameters of both encoders; raises as `load`."""
    return load_folder(folder, read_dual_config, clip.init, dual_table, ignored=_BUFFERS)


def table(c: ClipConfig, prefix: str = "") -> list[Entry]:
    """An entry for every parameter of `clip.init`."""
    p, top = c.patch_size, "vision_model"

    def read(x):
        return rearrange(x, "D c p q -> (p q c) D")

    def write(x):
        return rearrange(x, "(p q c) D -> D c p q", p=p, q=p)

    embeddings = f"{top}.embeddings"
    return [
        Entry(f"{prefix}patch_embedding", f"{embeddings}.patch_embedding.weight", read, write),
        Entry(f"{prefix}class_embedding", f"{embeddings}.class_embedding"),
        Entry(f"{prefix}position_embedding", f"{embeddings}.position_embedding.weight"),
        # The published weights have the spelling "layrnorm".
        *_norm(f"{prefix}norm_in", f"{top}.pre_layrnorm"),
        *_norm(f"{prefix}norm_out", f"{top}.post_layernorm"),
        *_layers(prefix, top),
    ]


def dual_table(c: DualConfig) -> list[Entry]:
    """An entry for every parameter of `clip.init` of both encoders."""
    embeddings = "text_model.embeddings"
    return [
        *table(c.vision, "vision/"),
        Entry("text/token_embedding", f"{embeddings}.token_embedding.weight"),
        Entry("text/position_embedding", f"{embeddings}.position_embedding.weight"),
        *_norm("text/norm_out", "text_model.final_layer_norm"),
        *_layers("text/", "text_model"),
        Entry("visual_projection", "visual_projection.weight", transpose, transpose),
        Entry("text_projection", "text_projection.weight", transpose, transpose),
    ]


def _layers(prefix: str, top: str) -> list[Entry]:
    ours, theirs = f"{prefix}layers", f"{top}.encoder.layers.{{}}"
    entries = [
        *_norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
        *_norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
    ]
    linears = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
               "out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
    for one, name in linears.items():
        weight = f"{theirs}.{name}.weight"
        entries.append(Entry(f"{ours}/{one}/kernel", weight, transpose, transpose))
        entries.append(Entry(f"{ours}/{one}/bias", f"{theirs}.{name}.bias"))
    return entries


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")]
