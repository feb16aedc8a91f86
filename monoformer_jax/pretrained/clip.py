"""Key table of transformers' CLIPVisionModel, and its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from einops import rearrange

from monoformer_jax.errors import require
from monoformer_jax.nn import clip
from monoformer_jax.nn.clip import ClipConfig
from monoformer_jax.pretrained.folder import load_folder, size_field
from monoformer_jax.pretrained.table import Entry, transpose

# The text model and projections of a full CLIP, and a buffer of older transformers versions.
IGNORED = r"text_model\..*|.*_projection\.weight|logit_scale|.*\.position_ids"


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
    act = values.get("hidden_act", "quick_gelu")
    require(act == "quick_gelu", f"{where}: hidden_act must be quick_gelu, not {act!r}")
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


def table(c: ClipConfig) -> list[Entry]:
    """An entry for every parameter of `clip.init`."""
    p, top, layer = c.patch_size, "vision_model", "vision_model.encoder.layers.{}"

    def read(x):
        return rearrange(x, "D c p q -> (p q c) D")

    def write(x):
        return rearrange(x, "(p q c) D -> D c p q", p=p, q=p)

    entries = [
        Entry("patch_embedding", f"{top}.embeddings.patch_embedding.weight", read, write),
        Entry("class_embedding", f"{top}.embeddings.class_embedding"),
        Entry("position_embedding", f"{top}.embeddings.position_embedding.weight"),
    ]
    # The published weights have the spelling "layrnorm".
    norms = {
        "norm_in": f"{top}.pre_layrnorm",
        "norm_out": f"{top}.post_layernorm",
        "layers/norm1": f"{layer}.layer_norm1",
        "layers/norm2": f"{layer}.layer_norm2",
    }
    for ours, theirs in norms.items():
        entries.append(Entry(f"{ours}/scale", f"{theirs}.weight"))
        entries.append(Entry(f"{ours}/bias", f"{theirs}.bias"))
    linears = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
               "out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
    for ours, theirs in linears.items():
        name = f"{layer}.{theirs}"
        entries.append(Entry(f"layers/{ours}/kernel", f"{name}.weight", transpose, transpose))
        entries.append(Entry(f"layers/{ours}/bias", f"{name}.bias"))
    return entries
