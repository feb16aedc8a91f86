"""A document: a list of texts and images, turned into streams that are one entry a token.

    build(["draw a one", Image(x, denoise=True)], …)

    tokens    <s>  d  r  …  e             <|im_start|>  <image>  <image> … <image>      <|im_end|>  </s>
    kinds     TEXT …                      TEXT          TIME     PATCH   … PATCH        TEXT        TEXT
    targets   d    r  a  …  <|im_start|>  -             -        -       … <|im_end|>   </s>        -

Each position carries the token that it must predict (`-`: none, weight 0), so packing cannot make a
loss cross from one document into the next.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from monoformer_jax.batch import PATCH, TEXT, TIME, patchify
from monoformer_jax.config import ModelConfig
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require

# The streams of the batch contract that do not depend on the row: [n, …] for n tokens.
Document = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Image:
    """An image in a document: context to look at, or one that the model learns to paint."""

    pixels: np.ndarray  # float [height, width, C], in [-1, 1] or the mean of a VAE latent
    denoise: bool
    logvar: np.ndarray | None = None  # of a VAE latent, as large


@dataclasses.dataclass(frozen=True)
class Features:
    """An image to look at as a vision encoder sees it: the only kind in a model that has one."""

    values: np.ndarray  # float [n, F]


@dataclasses.dataclass(frozen=True)
class UntrainedText:
    """Text that is read and not learned: what the other side of a conversation says."""

    text: str


class EndOfTurn:
    """</s> inside a document: an answer is over, and the conversation goes on."""


Part = str | UntrainedText | EndOfTurn | Image | Features


def build(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    text_beside_images: bool = True,
    closing: Sequence[int] | None = None,
    with_logvar: bool = False,
) -> Document:
    """Streams of one document.

    Args:
      parts: texts, images and features in reading order; an image brings its <|im_start|> and
        <|im_end|>.
      tokenizer: gives the ids.
      model: gives the patch size and the channels.
      text_beside_images: False gives no text loss in a document with a denoised image.
      closing: ids of its last tokens, </s> unless given; a prompt to be continued has none.
      with_logvar: whether the log-variance of latents goes with them.

    Raises:
      InputError: an image whose side is not divisible by the patch, or with other channels, or
        an image to look at that is not in the form which this model sees.
    """
    pieces = [_text([tokenizer.bos_id], model)]
    for part in parts:
        if isinstance(part, Image | Features):
            pieces.append(_text([tokenizer.im_start_id], model))
            image = _image if isinstance(part, Image) else _features
            pieces.append(image(part, tokenizer, model))
            pieces.append(_text([tokenizer.im_end_id], model))
        elif isinstance(part, EndOfTurn):
            pieces.append(_text([tokenizer.eos_id], model))
        else:
            asked = isinstance(part, UntrainedText)
            ids = tokenizer.encode(part.text if asked else part)
            pieces.append(_text(ids, model) | {"target_weights": np.full(len(ids), not asked)})
    pieces.append(_text([tokenizer.eos_id] if closing is None else closing, model))
    document = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    if not with_logvar:
        document["patch_logvar"] = document["patch_logvar"][:, :0]
    said = (document["token_types"] == TEXT) & document["target_weights"]
    learned = np.append(said[1:], False)
    if not text_beside_images and document["denoise"].any():
        learned[:] = False
    document["targets"] = np.append(document["tokens"][1:], tokenizer.pad_id).astype(np.int32)
    document["target_weights"] = learned.astype(np.float32)
    return document


def truncate(document: Document, length: int) -> Document:
    """The first `length` tokens of a text; a document with an image comes back whole."""
    if len(document["tokens"]) <= length or (document["token_types"] != TEXT).any():
        return document
    document = {name: stream[:length].copy() for name, stream in document.items()}
    document["target_weights"][-1] = 0  # its target was cut off
    return document


def describe(tokens: np.ndarray, token_types: np.ndarray, tokenizer: Tokenizer) -> str:
    """One line to recognise a document by: its text, and <image n> for an image of n patches."""
    words = []
    for kind, run in itertools.groupby(range(len(token_types)), key=lambda i: token_types[i]):
        run = list(run)
        if kind == TEXT:
            words.append(tokenizer.decode(tokens[run].tolist()))
        elif kind == PATCH:
            words.append(f"<image {len(run)}>")
    return "".join(words)


def _text(ids: Sequence[int], model: ModelConfig) -> Document:
    n = len(ids)
    return {
        "tokens": np.asarray(ids, np.int32),
        "token_types": np.full(n, TEXT, np.int32),
        "denoise": np.zeros(n, np.bool_),
        "patches": np.zeros((n, model.patch_dim), np.float32),
        "patch_logvar": np.zeros((n, model.patch_dim), np.float32),
        "patch_positions": np.zeros((n, 2), np.int32),
        "features": np.zeros((n, model.feature_dim), np.float32),
        "target_weights": np.ones(n, np.bool_),  # whether each is worth predicting
    }


def _image(image: Image, tokenizer: Tokenizer, model: ModelConfig) -> Document:
    fits = image.pixels.ndim == 3 and image.pixels.shape[-1] == model.channels
    require(fits, f"an image of shape {image.pixels.shape} is not [h, w, {model.channels}]")
    require(
        image.denoise or not model.feature_dim,
        "this model looks at images through its vision encoder: give Features",
    )
    patches, patch_positions = patchify(image.pixels, model.patch_size)
    first = model.time_tokens  # which stand in front
    n = first + len(patches)
    stream = _text([tokenizer.image_id] * n, model) | {
        "token_types": np.array([TIME] * first + [PATCH] * (n - first), np.int32),
        "denoise": np.full(n, image.denoise),
        "patches": np.pad(patches, ((first, 0), (0, 0))),
        "patch_positions": np.pad(patch_positions, ((first, 0), (0, 0))),
    }
    if image.logvar is not None:
        logvar, _ = patchify(image.logvar, model.patch_size)
        stream["patch_logvar"] = np.pad(logvar, ((first, 0), (0, 0)))
    return stream


def _features(image: Features, tokenizer: Tokenizer, model: ModelConfig) -> Document:
    fits = image.values.ndim == 2 and image.values.shape[1] == model.feature_dim
    require(fits, f"features {image.values.shape} are not [n, {model.feature_dim}]")
    first = model.time_tokens
    n = first + len(image.values)
    return _text([tokenizer.image_id] * n, model) | {
        "token_types": np.array([TIME] * first + [PATCH] * (n - first), np.int32),
        "features": np.pad(image.values, ((first, 0), (0, 0))).astype(np.float32),
    }
