"""What a run is trained on: its sources in numbers, and its first packed rows token by token."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.attention.mask import dense_mask, row_masks
from monoformer_jax.batch import PAD, PATCH, Batch, Document, select, unpatchify
from monoformer_jax.config import TokenLayout
from monoformer_jax.data.held_out import build_documents, is_trained, read_examples
from monoformer_jax.data.image_io import to_pil
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.tokenizer import Tokenizer, decode_after
from monoformer_jax.evaluation.html import escape, image, table, write_page
from monoformer_jax.sampling.sampler import Sampler

COMMAND = "train --inspect"
_ROWS = 2  # that are shown
_PROBED = 500  # examples of each source whose length is measured
_TYPES = ("PAD", "TEXT", "TIME", "PATCH")
# Queries of each type in the picture of the mask, and tokens of it in the text; keys that are not seen.
_COLOURS = ("#dddddd", "#3b6ea5", "#c77700", "#e8a33d")
_STYLE = """
.document { border: 2px solid #888; border-radius: 6px; padding: .6em; margin: .6em 0; }
.token { display: inline-block; border-bottom: 3px solid; margin: 0 1px 6px; white-space: pre;
         font-family: monospace; padding: 0 2px; min-width: .6em; }
.learned { background: #fff3b0; }
.picture { display: inline-block; margin: 4px; vertical-align: top; font-size: .8em; }
"""
_LEGEND = "".join(
    f'<span class="token" style="border-color:{colour}">{name}</span> '
    for name, colour in zip(_TYPES, _COLOURS)
)


def write_inspection(path: epath.Path, sampler: Sampler) -> None:
    """Writes the page about the data of a run; trains nothing.

    Args:
      sampler: config and tokenizer of the run; it needs no weights.

    Raises:
      InputError: data that training would refuse.
    """
    config, tokenizer = sampler.config, sampler.tokenizer
    group = config.batch_size // config.streams
    batches = Batches(config, tokenizer, range(group)).iterator
    # As many rows as a stream packs at once, to estimate the documents of a row.
    made = [next(batches) for _ in range(max(1, config.data.packing_buffer // group))]
    documents = sum(int(batch["segment_ids"].max(-1).sum()) for batch in made)
    per_row = documents / (group * len(made))
    rows = [select(made[0], number) for number in range(min(group, _ROWS))]
    c = config.data
    body = [
        f"<p>{config.steps:,} steps of {config.batch_size} rows of {c.max_seq_len} tokens; about "
        f"{per_row:.1f} documents a row. Nothing was trained.</p>",
        "<h2>Sources</h2>",
        _sources(sampler, per_row * config.batch_size * config.steps),
        f'<p class="note">Tokens and "too long" are of up to {_PROBED} examples of each source, with '
        "whole prompts; the others follow from the config and the rows below. A document longer than a "
        "row is dropped if it has an image to generate, and else cut, between turns if it can be.</p>",
        f"<h2>First rows</h2><p>{_LEGEND} The line below a token is its type; a yellow token is "
        "learned, from the token before it.</p>",
        *(_row(number, row, config.layout, tokenizer) for number, row in enumerate(rows, 1)),
    ]
    write_page(path, f"Data of {config.name}", "\n".join(body), COMMAND, _STYLE)


@dataclasses.dataclass(frozen=True)
class SourceNumbers:
    """Numbers of a source.

    Attributes:
      examples: number of examples.
      held_out: share of those that were read that are held out.
      lengths: tokens of the trained examples that were read.
      too_long: share of these that do not fit in a row.
      images: mean number of images in them.
    """

    examples: int
    held_out: float
    lengths: list[int]
    too_long: float
    images: float


def measure_sources(sampler: Sampler) -> dict[str, SourceNumbers]:
    """Reads up to 500 examples of each source."""
    config, found = sampler.config, {}
    c, layout = config.data, config.layout
    for name, source in open_sources(c, layout.channels).items():
        split = 0.0 if name in c.validation_records else c.validation_split
        probed = read_examples(source.examples, _some(len(source.examples)))
        sides = [is_trained(example, split) for example in probed]
        documents = build_documents(
            c, source, sampler.tokenizer, layout,
            text_beside_images=config.loss.text_beside_images,
            keep=lambda example, split=split: is_trained(example, split),
        )  # fmt: skip
        read = [document for _, document in itertools.islice(documents, _PROBED)]
        lengths = [len(document["tokens"]) for document in read]
        found[name] = SourceNumbers(
            len(source.examples), 1 - float(np.mean(sides)), lengths,
            float(np.mean([length > c.max_seq_len for length in lengths])),
            float(np.mean([document["image_ids"].max() for document in read])),
        )  # fmt: skip
    return found


def _some(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, _PROBED)).astype(int).tolist()


def _sources(sampler: Sampler, documents: float) -> str:
    """The table of the sources.

    Args:
      documents: number of documents in the rows of the whole run.
    """
    numbers, mixture = measure_sources(sampler), sampler.config.data.mixture
    total = sum(mixture[name] for name in numbers)
    fitting = sum(mixture[name] * (1 - x.too_long) for name, x in numbers.items())
    rows = []
    for name, x in numbers.items():
        drawn = documents * mixture[name] / max(fitting, 1e-9)  # the too long ones included
        trained = x.examples * (1 - x.held_out)
        rows.append((
            escape(name), f"{mixture[name] / total:.1%}", f"{x.examples:,}", f"{x.held_out:.1%}",
            f"{statistics.mean(x.lengths):.0f}", f"{statistics.median(x.lengths):.0f}",
            f"{max(x.lengths):,}", f"{x.images:.1f}", f"{x.too_long:.1%}",
            f"{drawn * (1 - x.too_long):,.0f}", f"{drawn / trained:.2f}",
        ))  # fmt: skip
    head = ("source", "share of documents", "examples", "held out", "tokens: mean", "median", "longest",
            "images", "too long: dropped", "documents in the run", "epochs of the run")  # fmt: skip
    return table(head, rows, numbers=True)


def _row(number: int, row: Document, layout: TokenLayout, tokenizer: Tokenizer) -> str:
    """One packed row: its mask, its documents, and a list of its tokens."""
    words, parts = _words(row, tokenizer), []
    for document in range(1, row["segment_ids"].max() + 1):
        here = np.flatnonzero(row["segment_ids"] == document)
        cells = []
        # By image too: without TIME tokens, copies stand side by side.
        kinds = np.stack([row["token_types"], row["image_ids"]], -1)
        for kind, group in itertools.groupby(here, key=lambda i: tuple(kinds[i])):
            places = list(group)
            if kind[0] == PATCH:
                copy = bool((row["prefix_stop"][places[0]] > here[0]).any())
                cells.append(_picture(select(row, places), layout, copy))
            else:
                cells += [_token(row, i, words) for i in places]
        span = f"document {document}: tokens {here[0]} to {here[-1]}"
        parts.append(f'<div class="document"><div class="note">{span}</div>{"".join(cells)}</div>')
    padding = int((row["token_types"] == PAD).sum())
    length = len(row["tokens"])
    return (
        f"<h3>Row {number}</h3>{''.join(parts)}<p>{padding} of {length} tokens are padding.</p>"
        f"<p>The mask, queries down and keys across, each in the colour of the query's type:</p>"
        f"{image(mask_picture(row), min(3 * length, 700))}"
        f"<details><summary>Every token of row {number}</summary>{_tokens(row, words)}</details>"
    )


def _words(row: Document, tokenizer: Tokenizer) -> list[str]:
    """The text of each token."""
    special = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", tokenizer.pad_id: "<pad>",
               tokenizer.image_id: "<image>", tokenizer.im_start_id: "<|im_start|>",
               tokenizer.im_end_id: "<|im_end|>"}  # fmt: skip
    words, before = [], []
    for token in row["tokens"].tolist():
        if token in special:
            words.append(special[token])
            before = []
        else:
            words.append(decode_after(tokenizer, before[-8:], [token]))
            before.append(token)
    return words


def _token(row: Document, place: int, words: list[str]) -> str:
    colour = _COLOURS[row["token_types"][place]]
    learned = place > 0 and row["target_weights"][place - 1] > 0
    return (
        f'<span class="token{" learned" if learned else ""}" style="border-color:{colour}" '
        f'title="{escape(", ".join(_facts(row, place, words)))}">{escape(words[place])}</span>'
    )


def _facts(row: Document, place: int, words: list[str]) -> list[str]:
    """Place, type, id, text, target and weight of a token."""
    weight, target = float(row["target_weights"][place]), "-"
    if weight and place + 1 < len(words):
        target = f"{words[place + 1]!r} (id {row['targets'][place]})"
    return [
        str(place), _TYPES[row["token_types"][place]], f"id {row['tokens'][place]}",
        repr(words[place]), f"target {target}", f"weight {weight:g}",
    ]  # fmt: skip


def _tokens(row: Document, words: list[str]) -> str:
    """The list of all tokens; consecutive ones without a target in an image are one line."""
    lines = []
    plain = (row["token_types"] == PATCH) & (row["target_weights"] == 0)
    for alike, group in itertools.groupby(range(len(words)), key=lambda i: bool(plain[i])):
        places = list(group)
        for place in places[:1] if alike else places:
            if row["token_types"][place] != PAD:
                facts = _facts(row, place, words)
                if alike and len(places) > 1:
                    facts[0] = f"{places[0]} to {places[-1]}"
                document = str(row["segment_ids"][place])
                lines.append([escape(fact) for fact in [*facts, document]])
    return table(("place", "type", "id", "text", "target", "weight", "document"), lines)


def _picture(patches: Document, layout: TokenLayout, copy: bool) -> str:
    """An image of a row, from its PATCH tokens; `copy`: a noised copy of one before it."""
    height, width = patches["patch_positions"].max(0) + 1
    kind = "looked at"
    if patches["denoise"][0]:
        kind = f"{'noised copy' if copy else 'generated: noised'}, with the image loss"
    shown = ""
    if not layout.feature_dim or patches["denoise"][0]:
        p = layout.patch_size
        values = unpatchify(patches["patches"], height * p, width * p, p)
        shown = image(thumbnail(values), 96, kind)
    return f'<span class="picture">{shown}{height * width} PATCH<br>{kind}</span>'


def thumbnail(values: np.ndarray) -> PIL.Image.Image:
    """Pixels as they are; of latents, [h, w, C], three channels scaled to their range."""
    if values.shape[-1] in (1, 3):
        return to_pil(values)
    shown = values[..., :3] if values.shape[-1] > 2 else values[..., :1]
    low, high = shown.min(), shown.max()
    return to_pil(2 * (shown - low) / max(high - low, 1e-6) - 1)


def mask_picture(row: Batch) -> PIL.Image.Image:
    """The attention mask of a row, L × L pixels: query q sees key k where pixel (k, q) is coloured."""
    masks = row_masks({name: values[None] for name, values in row.items()})
    mask = np.asarray(dense_mask(masks, len(row["tokens"])))[0]
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _COLOURS], np.uint8)
    of_query = palette[row["token_types"]][:, None]
    return PIL.Image.fromarray(np.where(mask[..., None], of_query, np.uint8(255)))
