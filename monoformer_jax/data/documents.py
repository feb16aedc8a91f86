"""Documents: the parts of an example as fields with one entry per token.

    build_document(["draw a one", Image(x, denoise=True)], …)

    tokens       <s>  d r …  e             <|im_start|>  <image>  <image> … <image>     <|im_end|>  </s>
    token_types  TEXT …                    TEXT          TIME     PATCH   … PATCH       TEXT        TEXT
    targets      d    r a …  <|im_start|>  -             -        -       … <|im_end|>  </s>        -

Each position has its target token (`-`: none, weight 0), so after packing no loss crosses a document
boundary.

With `noised_copies`, an image to generate that more than the end of the document follows stays clean in
its place, and is trained on a copy of its TIME and PATCH tokens behind the document, with the same
positions. The copy sees what precedes the image, and itself; nothing sees the copy:

    <s> a <|im_start|> T p p <|im_end|> b </s>   T' p' p'     prefix_stop of T' and p': 3
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from monoformer_jax.batch import (
    PATCH,
    TEXT,
    TIME,
    Document,
    assemble,
    concatenate,
    patchify,
    select,
)
from monoformer_jax.config import TokenLayout
from monoformer_jax.data.tokenizer import Tokenizer, encode_after
from monoformer_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Image:
    """An image in a document: a conditioning image, or one that the model learns to generate."""

    pixels: np.ndarray  # float [height, width, C], in [-1, 1] or the mean of a VAE latent
    denoise: bool
    logvar: np.ndarray | None = None  # log-variance of a VAE latent, same shape


@dataclasses.dataclass(frozen=True)
class Features:
    """A conditioning image as vision encoder features; required by a model with a vision encoder."""

    values: np.ndarray  # float [n, F]


@dataclasses.dataclass(frozen=True)
class UntrainedText:
    """Text without loss, such as a user's turn."""

    text: str


@dataclasses.dataclass(frozen=True)
class EndOfTurn:
    """</s> inside a document: the end of a prompt or an answer."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of an example in one or more wordings; `draw_prompts` samples one of them."""

    texts: tuple[str, ...]


Part = str | UntrainedText | EndOfTurn | Image | Features


def draw_order(
    parts: Sequence[Part | Prompt], rng: np.random.Generator, image_first: float
) -> list[Part | Prompt]:
    """Of a caption and its image to generate, puts the image first with this probability.

    The caption, in one of its wordings, is then text that is read from the image. Other examples stay.
    """
    captioned = len(parts) == 2 and isinstance(parts[0], Prompt) and isinstance(parts[1], Image)
    if not (image_first and captioned and parts[1].denoise and rng.random() < image_first):
        return list(parts)
    texts = parts[0].texts
    return [parts[1], texts[rng.integers(len(texts))]]


def draw_clean(
    parts: Sequence[Part | Prompt], rng: np.random.Generator, probability: float
) -> list[Part | Prompt]:
    """With this probability the images to generate of an example are clean, and its text is learned
    beside them, as sampling has them behind it."""
    if not (probability and rng.random() < probability):
        return list(parts)
    return [
        dataclasses.replace(part, denoise=False) if isinstance(part, Image) else part
        for part in parts
    ]


def draw_prompts(
    parts: Sequence[Part | Prompt], rng: np.random.Generator, dropout: float, end_of_prompt: bool
) -> list[Part]:
    """Samples one wording of every prompt; with `end_of_prompt`, appends </s> to it.

    Prompts are dropped with probability `dropout`, for classifier-free guidance.
    """
    drawn: list[Part] = []
    for part in parts:
        if not isinstance(part, Prompt):
            drawn.append(part)
        elif rng.random() >= dropout:
            drawn += [
                part.texts[rng.integers(len(part.texts))],
                *([EndOfTurn()] if end_of_prompt else []),
            ]
    return drawn


def build_document(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    layout: TokenLayout,
    *,
    text_beside_images: bool = True,
    noised_copies: bool = False,
    closing: Sequence[int] | None = None,
    after: Document | None = None,
    before: Sequence[int] = (),
) -> Document:
    """Builds the fields of one document, or of the continuation of one.

    Args:
      parts: texts, images and features in reading order; <|im_start|> and <|im_end|> are added
        around images.
      tokenizer: see `data.tokenizer`.
      layout: token layout of the model.
      text_beside_images: False: no text loss in a document with a denoised image.
      noised_copies: train images that something follows on copies, see the module docstring; the
        layout must have them.
      closing: ids of the last tokens, default </s>; [] for a prompt to be continued.
      after: the document that this one continues: no <s> is added, positions and image ids
        continue, and <|im_start|> is not repeated if `after` ends with it.
      before: the ids at the end of `after` that the first part continues as one text, see
        `open_text`.

    Raises:
      InputError: an image whose side is not divisible by the patch size, one with another number of
        channels, or a conditioning image in a form that the model does not take.
    """
    pieces: list[dict] = [] if after is not None else [{"tokens": [tokenizer.bos_id]}]
    begun = after is not None and int(after["tokens"][-1]) == tokenizer.im_start_id
    images = 0 if after is None else int(after["image_ids"].max())
    joined, copied = _joined(parts), []
    for number, part in enumerate(joined, 1):
        if isinstance(part, Image | Features):
            if not begun:
                pieces.append({"tokens": [tokenizer.im_start_id]})
            images += 1
            if noised_copies and isinstance(part, Image) and part.denoise and number < len(joined):
                part = dataclasses.replace(part, denoise=False)
                copied.append(images)
            piece = _image if isinstance(part, Image) else _features
            pieces += [x | {"image_ids": images} for x in piece(part, tokenizer, layout)]
            pieces.append({"tokens": [tokenizer.im_end_id]})
        elif isinstance(part, EndOfTurn):
            pieces.append({"tokens": [tokenizer.eos_id]})
        else:
            read = isinstance(part, UntrainedText)
            ids = tokenizer.encode(part.text) if read else encode_after(tokenizer, before, part)
            pieces.append({"tokens": ids, "target_weights": float(not read)})
        begun, before = False, ()
    pieces.append({"tokens": [tokenizer.eos_id] if closing is None else closing})
    document = assemble(layout, pieces, token_types=TEXT, segment_ids=1, target_weights=1)
    first = 0 if after is None else int(after["positions"][-1]) + 1
    document["positions"] += np.arange(first, first + len(document["tokens"]), dtype=np.int32)
    # Whether each token is to be predicted; then, shifted by one, whether each position has a target.
    learned = (document["token_types"] == TEXT) & (document["target_weights"] > 0)
    if not text_beside_images and (copied or document["denoise"].any()):
        learned[:] = False
    document["targets"][:-1] = document["tokens"][1:]
    document["targets"][-1] = tokenizer.pad_id
    document["target_weights"][:-1] = learned[1:]
    document["target_weights"][-1] = 0
    copies = [_copy(document, image, images + n) for n, image in enumerate(copied, 1)]
    return concatenate([document, *copies]) if copies else document


def _copy(document: Document, image: int, number: int) -> Document:
    """The noised copy of an image, which becomes image `number` of the document."""
    places = np.flatnonzero(document["image_ids"] == image)
    copy = select(document, places)
    copy["image_ids"][:] = number
    copy["denoise"][:] = True
    copy["prefix_stop"][:] = places[0]
    copy["target_weights"][:] = 0
    return copy


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Joins adjacent texts of one kind, which must be tokenized together."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif isinstance(part, UntrainedText) and isinstance(last, UntrainedText):
            joined[-1] = UntrainedText(last.text + part.text)
        else:
            joined.append(part)
    return joined


def open_text(parts: Sequence[Part], tokenizer: Tokenizer, before: Sequence[int] = ()) -> list[int]:
    """Ids of the text at the end of `parts` that a token or text after them continues.

    Empty after an image, </s> or text without loss: the next text is then one of its own, as in
    training.

    Args:
      before: the open text that the first part continues.
    """
    joined = _joined(parts)
    if not joined:
        return list(before)
    if not isinstance(joined[-1], str):
        return []
    before = before if len(joined) == 1 else ()
    return [*before, *encode_after(tokenizer, before, joined[-1])]


def split_document(document: Document, length: int, tokenizer: Tokenizer) -> list[Document]:
    """Splits a document longer than `length` tokens between turns, into as few pieces as possible.

    A turn is a user's text and the answer, up to its </s>. Every piece begins with <s> and the images
    before the first text. A turn that alone is longer is truncated, and left out if nothing of its
    answer fits.

    Returns:
      The pieces; none if an image does not fit or would be truncated, or if it is to be generated,
      since its prompt must stay whole.
    """
    tokens, text = document["tokens"], document["token_types"] == TEXT
    if len(tokens) <= length:
        return [document]
    marks = np.isin(tokens, [tokenizer.bos_id, tokenizer.im_start_id, tokenizer.im_end_id])
    head = int(np.argmin(marks | ~text))  # tokens before the first text
    room = length - head
    if document["denoise"].any() or room < 1:
        return []
    # A user's text, which has no loss, follows the </s> of an answer, but not that of a prompt.
    last = text & (tokens == tokenizer.eos_id) & (document["target_weights"] == 0)
    ends = np.flatnonzero(last) + 1
    pieces, begin = [], head
    while begin < len(tokens):
        turns = ends[(ends > begin) & (ends <= begin + room)]
        end = turns[-1] if len(turns) else ends[ends > begin][0]
        stop = min(end, begin + room)
        if stop < end and not text[begin:end].all():
            return []
        if document["target_weights"][begin : stop - 1].any():
            pieces.append(_piece(document, head, begin, stop))
        begin = end
    return pieces


def _piece(document: Document, head: int, begin: int, end: int) -> Document:
    """The first `head` tokens of a document, continued by its tokens from `begin` to `end`."""
    first, rest = select(document, slice(head)), select(document, slice(begin, end))
    skipped = document["image_ids"][:begin].max() - first["image_ids"].max()
    rest["image_ids"] = rest["image_ids"] - skipped * (rest["image_ids"] > 0)
    piece = concatenate([first, rest])
    piece["positions"] = np.arange(len(piece["tokens"]), dtype=np.int32)
    piece["targets"][head - 1] = piece["tokens"][head]
    piece["target_weights"][head - 1] = document["target_weights"][begin - 1]
    piece["target_weights"][-1] = 0  # the next token, if there is one, is in another piece
    return piece


def describe(tokens: np.ndarray, token_types: np.ndarray, tokenizer: Tokenizer) -> str:
    """One-line description of a document: its text, and <image n> for an image of n patches."""
    pieces = []
    for token_type, run in itertools.groupby(range(len(token_types)), key=lambda i: token_types[i]):
        run = list(run)
        if token_type == TEXT:
            pieces.append(tokenizer.decode(tokens[run].tolist()))
        elif token_type == PATCH:
            pieces.append(f"<image {len(run)}>")
    return "".join(pieces)


def _image(image: Image, tokenizer: Tokenizer, layout: TokenLayout) -> list[dict]:
    fits = image.pixels.ndim == 3 and image.pixels.shape[-1] == layout.channels
    require(fits, f"an image of shape {image.pixels.shape} is not [h, w, {layout.channels}]")
    require(
        image.denoise or not layout.feature_dim,
        "this model encodes conditioning images with a vision encoder: give Features",
    )
    patches, positions = patchify(image.pixels, layout.patch_size)
    values = {"patches": patches, "patch_positions": positions}
    if image.logvar is not None and layout.latent_variance:
        values["patch_logvar"] = patchify(image.logvar, layout.patch_size)[0]
    time, patch = _image_tokens(len(patches), tokenizer, layout)
    return [time | {"denoise": image.denoise}, patch | values | {"denoise": image.denoise}]


def _features(image: Features, tokenizer: Tokenizer, layout: TokenLayout) -> list[dict]:
    fits = image.values.ndim == 2 and image.values.shape[1] == layout.feature_dim
    require(fits, f"features {image.values.shape} are not [n, {layout.feature_dim}]")
    time, patch = _image_tokens(len(image.values), tokenizer, layout)
    return [time, patch | {"features": image.values}]


def _image_tokens(patches: int, tokenizer: Tokenizer, layout: TokenLayout) -> tuple[dict, dict]:
    """The TIME and the PATCH tokens of an image."""
    return tuple(
        {"tokens": np.full(n, tokenizer.image_id, np.int32), "token_types": kind}
        for n, kind in ((layout.time_tokens, TIME), (patches, PATCH))
    )
