"""Prompts: validation, conversion to unfinished documents, and the variants for guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monoformer_jax.batch import TEXT, Document, concatenate, select
from monoformer_jax.config import SamplingConfig, TokenLayout
from monoformer_jax.data.documents import Image, Part, UntrainedText, build_document
from monoformer_jax.data.templates import complete_prompt
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require, require_unicode
from monoformer_jax.sampling.sampler import Sampler

Parts = Sequence[Part]

# Least number of cache slots of sequences that text is decoded in: each size compiles decoding anew.
SLOTS = 256


def bucket(length: int, least: int = 64) -> int:
    """The power of two that a length is padded to, which limits the number of compilations."""
    return max(least, 1 << max(int(length) - 1, 0).bit_length())


def encode_prompt(
    sampler: Sampler,
    parts: Parts,
    *,
    reserve: int,
    closing: Sequence[int] = (),
    name: str = "the prompt",
) -> Document:
    """Returns the document of a prompt, to be continued by sampling.

    Args:
      parts: texts, images and features; an empty list is `<s>` alone.
      reserve: number of tokens that will follow it.
      closing: ids appended to it, such as <|im_start|>.
      name: how error messages call the prompt.

    Raises:
      InputError: an empty text or one that is not Unicode, an image above the trained size, or a prompt
        too long for the context.
    """
    check_parts(sampler, parts, name)
    config = sampler.config
    document = build_document(parts, sampler.tokenizer, config.layout, closing=closing)
    check_length(sampler, document, reserve, name)
    return document


def check_length(sampler: Sampler, document: Document, reserve: int, name: str) -> None:
    """Raises InputError if a document and `reserve` more tokens exceed the context."""
    length, context = len(document["tokens"]), sampler.config.data.max_seq_len
    require(
        length + reserve <= context,
        f"{name} has {length} tokens and {reserve} must follow, but the model's context is "
        f"{context} (data.max_seq_len): shorten it",
    )


def check_parts(sampler: Sampler, parts: Parts, name: str) -> None:
    """Raises InputError for a text that is empty or not Unicode, or an image above the trained size."""
    texts = [getattr(part, "text", part) for part in parts if isinstance(part, str | UntrainedText)]
    require(all(texts), f"{name} is empty: write something to continue")
    for text in texts:
        require_unicode(text, name)
    for part in parts:
        if isinstance(part, Image):
            check_size(sampler, part.pixels.shape[:2], f"an image in {name}")


def check_size(sampler: Sampler, size: tuple[int, int], name: str) -> None:
    """Raises InputError if a size is above the trained one or not a multiple of the patch size."""
    (height, width), most = size, sampler.config.data.image_size
    patch = sampler.config.layout.patch_size
    require(
        0 < height <= most and 0 < width <= most,
        f"{name} is {height}×{width}, but the model was trained up to {most}×{most} "
        "(data.image_size): make it smaller",
    )
    require(
        height % patch == 0 and width % patch == 0,
        f"{name} is {height}×{width}: both sides must be multiples of the patch size {patch}",
    )


def negative_parts(sampler: Sampler, sampling: SamplingConfig) -> list[Part]:
    """The negative prompt of `guidance_documents`, ended as a prompt is."""
    if not sampling.negative_prompt:
        return []
    return complete_prompt([sampling.negative_prompt], sampler.config.data.end_of_prompt)


def guidance_documents(
    document: Document,
    tokenizer: Tokenizer,
    layout: TokenLayout,
    branches: int,
    negative: Parts = (),
) -> list[Document]:
    """The prompt, its images alone, and the empty prompt, as in training with prompt dropout.

    `negative` follows the images of the second, which guidance leads away from.
    """
    if branches == 1:
        return [document]
    closing = [tokenizer.im_start_id]
    nothing = build_document([], tokenizer, layout, closing=closing)
    against = _without_text(document, tokenizer)
    if negative:
        images = select(against, slice(-1))  # without the <|im_start|> of the image to generate
        text = build_document(negative, tokenizer, layout, closing=closing, after=images)
        against = concatenate([images, text])
    return [document, against, nothing][:branches]


def _without_text(document: Document, tokenizer: Tokenizer) -> Document:
    """A prompt without its text: <s>, its images, and a final <|im_start|>."""
    kept = (tokenizer.bos_id, tokenizer.im_start_id, tokenizer.im_end_id)
    return select(document, (document["token_types"] != TEXT) | np.isin(document["tokens"], kept))
