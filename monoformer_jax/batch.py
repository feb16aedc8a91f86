"""The data contract: what `data/` makes and `models/` eats.

A row is a stream of L tokens of four kinds, several documents long. Every field is aligned with the
stream, so shapes are static, nothing is ragged and nothing loops over rows.

    field           dtype, shape      meaning
    tokens          int32 [B, L]      token id at TEXT, <image> at TIME and PATCH, pad id at PAD
    kinds           int32 [B, L]      PAD 0, TEXT 1, TIME 2, PATCH 3
    segment_ids     int32 [B, L]      number of the document in the row from 1; 0 at PAD
    positions       int32 [B, L]      RoPE position inside the document
    image_ids       int32 [B, L]      number of the image in the row from 1 on its TIME and PATCH
    denoise         bool [B, L]       TIME and PATCH of an image that is noised and has the loss
    patches         float32 [B, L, P] clean values at PATCH, in the order (C, ph, pw); 0 elsewhere
    patch_logvar    float32 [B, L, P] of latents kept as mean and log-variance, drawn at each step;
                                      [B, L, 0] where data.sample_latents is not set
    grid            int32 [B, L, 2]   row and column of the patch in its image
    features        float32 [B, L, F] a vision encoder's, at PATCH of context images; F may be 0
    targets         int32 [B, L]      the token that this position must predict
    target_weights  float32 [B, L]    its weight in the text loss; 0 where nothing is predicted

Axis legend of the whole library: B batch, L tokens, S keys, D embed, N query heads, K key/value
heads, H head dim, F mlp (or features of a vision encoder),
V vocabulary, P patch values, C channels, I images in a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from einops import rearrange

from monoformer_jax.config import Config
from monoformer_jax.errors import require

PAD, TEXT, TIME, PATCH = range(4)

Batch = Mapping[str, "np.ndarray | jax.Array"]


def spec(config: Config, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every field of a batch of `rows`, config.batch_size unless given."""
    model = config.model
    row = (rows or config.batch_size, config.data.max_seq_len)
    shapes = {
        "tokens": (row, np.int32),
        "token_types": (row, np.int32),
        "segment_ids": (row, np.int32),
        "positions": (row, np.int32),
        "image_ids": (row, np.int32),
        "denoise": (row, np.bool_),
        "patches": ((*row, model.patch_dim), np.float32),
        "patch_logvar": ((*row, model.patch_dim if config.data.sample_latents else 0), np.float32),
        "patch_positions": ((*row, 2), np.int32),
        "features": ((*row, model.feature_dim), np.float32),
        "targets": (row, np.int32),
        "target_weights": (row, np.float32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def check(batch: Batch, expected: Mapping[str, jax.ShapeDtypeStruct], max_images: int) -> None:
    """Raises ValueError, naming the field, where a host batch breaks the contract.

    It is for the host and for the first batch of a run: no later step pays for it.
    """
    if missing := sorted(expected.keys() ^ batch.keys()):
        raise ValueError(f"batch fields missing or unknown: {', '.join(missing)}")
    for name, want in expected.items():
        got = batch[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"batch field {name} is {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    token_types, segments, images = (batch[k] for k in ("token_types", "segment_ids", "image_ids"))
    in_image = (token_types == TIME) | (token_types == PATCH)
    rules = {
        "kinds: a value outside 0..3": (token_types < PAD) | (token_types > PATCH),
        "segment_ids: 0 is for PAD and PAD alone": (segments == 0) != (token_types == PAD),
        "image_ids: they stand on TIME and PATCH and nowhere else": (images > 0) != in_image,
        f"image_ids: more than {max_images} images in a row": images > max_images,
        "denoise: set outside an image": batch["denoise"] & ~in_image,
        "patches: values outside PATCH": (batch["patches"] != 0).any(-1) & (token_types != PATCH),
        "target_weights: set on PAD": (batch["target_weights"] != 0) & (token_types == PAD),
    }
    for rule, broken in rules.items():
        if broken.any():
            row, token = np.argwhere(broken)[0]
            raise ValueError(f"batch row {row}, token {token}: {rule}")


def number_images(token_types: np.ndarray) -> np.ndarray:
    """image_ids int32 [L] of one row; between two images there is always text."""
    in_image = (token_types == TIME) | (token_types == PATCH)
    begins = in_image & ~np.append(False, in_image[:-1])
    return (np.cumsum(begins) * in_image).astype(np.int32)


def patchify(image: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image into patches in raster order.

    Args:
      image: float [height, width, C].
      patch: side of a patch.

    Returns:
      patches float32 [n, P] with values in the order (C, ph, pw), and grid int32 [n, 2].

    Raises:
      InputError: a side is not divisible by `patch`.
    """
    height, width, _ = image.shape
    require(
        height % patch == width % patch == 0,
        f"image of {height}×{width} cannot be cut into patches of side {patch}",
    )
    patches = rearrange(image, "(h p) (w q) c -> (h w) (c p q)", p=patch, q=patch)
    patch_positions = np.stack(np.indices((height // patch, width // patch)), -1).reshape(-1, 2)
    return patches.astype(np.float32), patch_positions.astype(np.int32)


def unpatchify(patches: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """Inverse of `patchify`: [..., n, P] -> [..., height, width, C]."""
    return rearrange(
        patches, "... (h w) (c p q) -> ... (h p) (w q) c", h=height // patch, w=width // patch,
        p=patch, q=patch,
    )  # fmt: skip
