"""Data pipeline: sources -> documents -> mixture -> rows -> batches; deterministic and resumable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from monoformer_jax.batch import Document
from monoformer_jax.config import Config, DataConfig, TokenLayout
from monoformer_jax.data.documents import build_document, draw_prompts, truncate
from monoformer_jax.data.packing import LengthFilter, pack
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require


class Batches:
    """Infinite host batches: the rows of the global batch that one process holds.

    The global batch consists of `data.streams` groups of rows. Each group is packed by its own stream
    from its own shard of every source, so the content of a row depends only on the config, the step and
    the row index, not on the number of processes. A process runs the streams of its rows and discards
    the other rows.

    Attributes:
      iterator: iterator over batches of these rows, see `batch.spec` and `RowIterator`.
      dropped: number of documents dropped as longer than a row, since this process started.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rows: Sequence[int] | None = None):
        """Args:
        config: config of the run.
        tokenizer: see `data.tokenizer.open_tokenizer`.
        rows: row indices in ascending order; None: all, 0 to batch_size - 1.
        """
        layout, c = config.layout, config.data
        require(
            layout.vocab_size >= tokenizer.vocab_size,
            f"model.vocab_size={layout.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}",
        )
        sources = open_sources(c, layout.channels)
        for name, source in sources.items():
            require(
                len(source.examples) >= c.streams,
                f"data.streams={c.streams}, but source {name} has only "
                f"{len(source.examples)} examples",
            )
        group = config.batch_size // c.streams
        rows = range(config.batch_size) if rows is None else rows
        needed = sorted({row // group for row in rows})
        self._fits = [LengthFilter(c.max_seq_len) for _ in needed]
        to_document = functools.partial(
            _ToDocument, tokenizer=tokenizer, layout=layout, data=c,
            text_beside_images=config.loss.text_beside_images,
        )  # fmt: skip
        streams = {}
        for number, fits in zip(needed, self._fits):
            documents = _documents(sources, to_document, c, config.seed, number).filter(fits)
            packed = pack(documents, length=c.max_seq_len, bins=c.packing_bins, seed=config.seed,
                          pad_id=tokenizer.pad_id, max_images=config.max_images)  # fmt: skip
            streams[number] = iter(packed.batch(group))
        made = [number * group + i for number in needed for i in range(group)]
        kept = slice(None) if made == list(rows) else [made.index(row) for row in rows]
        self.iterator = RowIterator(streams, kept)

    @property
    def dropped(self) -> int:
        return sum(fits.dropped for fits in self._fits)


class RowIterator:
    """Iterator over rows of several streams, one batch per step. States are per stream, so any process
    can resume a stream."""

    def __init__(self, streams: dict[int, grain.DatasetIterator], kept: list[int] | slice):
        self._streams, self._kept = streams, kept

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        groups = [next(stream) for stream in self._streams.values()]
        return {name: np.concatenate([g[name] for g in groups])[self._kept] for name in groups[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the states of this process's streams, {stream number: JSON values}."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Restores `states`, which may include other streams; raises KeyError if one is missing."""
        for number, stream in self._streams.items():
            stream.set_state(states[str(number)])


def _documents(
    sources: Mapping[str, Source],
    to_document: Callable[[Source], _ToDocument],
    c: DataConfig,
    seed: int,
    number: int,
) -> grain.IterDataset:
    """Documents of one stream: its shard of every source, mixed by weight."""
    weights = np.array([c.mixture[name] for name in sources])
    documents = []
    for index, source in enumerate(sources.values()):
        # Explicit seeds: adding a source must not reorder the others.
        own = seed * 1000 + index
        examples = grain.MapDataset.source(source.examples).seed(own).shuffle()
        built = examples.random_map(
            to_document(source), seed=own
        )  # with new random numbers every epoch
        documents.append(built[number :: c.streams].repeat())
    mixture = grain.MapDataset.mix(documents, weights / weights.sum())
    # Records are prefetched from storage by threads; the digits are in memory and need none, since the
    # host builds the next batch while the device runs.
    threads, ahead = (16, 64) if c.records else (0, 0)
    return mixture.to_iter_dataset(grain.ReadOptions(threads, ahead))


# repr=False: grain logs the repr, which would contain all examples.
@dataclasses.dataclass(frozen=True, repr=False)
class _ToDocument:
    source: Source
    tokenizer: Tokenizer
    layout: TokenLayout
    data: DataConfig
    text_beside_images: bool

    def __call__(self, example, rng) -> Document:
        c = self.data
        parts = self.source.to_parts(example, rng)
        parts = draw_prompts(parts, rng, c.prompt_dropout, c.end_of_prompt)
        document = build_document(
            parts, self.tokenizer, self.layout, text_beside_images=self.text_beside_images
        )
        return truncate(document, c.max_seq_len) if c.truncate_text else document
