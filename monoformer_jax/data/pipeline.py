"""The training stream: sources -> documents -> mixture -> rows -> batches; deterministic, resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from monoformer_jax.config import Config
from monoformer_jax.data.documents import Document, build, truncate
from monoformer_jax.data.packing import LengthFilter, pack
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require


class Batches:
    """Endless host batches: the rows of the global batch that one process holds.

    The global batch is `data.streams` groups of rows. Each group is packed by a stream of its own from
    its own share of every source, so what a row holds depends on the config, the step and the row
    alone, and never on the number of processes. A process runs the streams that its rows come from,
    and keeps its rows.

    Attributes:
      iterator: gives batches of these rows, see `batch.spec`; see `RowIterator` for its state.
      dropped: documents left out because they are longer than a row, since this process started.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rows: Sequence[int] | None = None):
        """Args:
        config: of the run.
        tokenizer: see `data.tokenizer.open_tokenizer`.
        rows: in ascending order; None is all, 0 to batch_size - 1.
        """
        require(
            config.model.vocab_size >= tokenizer.vocab_size,
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}",
        )
        sources = open_sources(config.data)
        for name, source in sources.items():
            require(
                len(source.examples) >= config.data.streams,
                f"data.streams={config.data.streams}, but source {name} has only "
                f"{len(source.examples)} examples to share out",
            )
        group = config.batch_size // config.data.streams
        rows = range(config.batch_size) if rows is None else rows
        needed = sorted({row // group for row in rows})
        self._fits = [LengthFilter(config.data.max_seq_len) for _ in needed]
        streams = {
            number: iter(_stream(sources, config, tokenizer, number, fits).batch(group))
            for number, fits in zip(needed, self._fits)
        }
        made = [number * group + i for number in needed for i in range(group)]
        kept = slice(None) if made == list(rows) else [made.index(row) for row in rows]
        self.iterator = RowIterator(streams, kept)

    @property
    def dropped(self) -> int:
        return sum(fits.dropped for fits in self._fits)


class RowIterator:
    """Rows of several streams, one batch a step. The state of a stream belongs to it, not to a process:
    whoever runs it next goes on from there."""

    def __init__(self, streams: dict[int, grain.DatasetIterator], kept: list[int] | slice):
        self._streams, self._kept = streams, kept

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        groups = [next(stream) for stream in self._streams.values()]
        return {name: np.concatenate([g[name] for g in groups])[self._kept] for name in groups[0]}

    def get_state(self) -> dict[str, Any]:
        """JSON values by number of the stream, of those that run here."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Goes to `states`, which may hold other streams as well; KeyError if one is missing."""
        for number, stream in self._streams.items():
            stream.set_state(states[str(number)])


def _stream(
    sources: Mapping[str, Source],
    config: Config,
    tokenizer: Tokenizer,
    number: int,
    fits: LengthFilter,
) -> grain.IterDataset:
    """The rows of one stream, without the batch axis."""
    weights = np.array([config.data.mixture[name] for name in sources])
    documents = [
        _documents(source, config, tokenizer, place)[number :: config.data.streams].repeat()
        for place, source in enumerate(sources.values())
    ]
    mixture = grain.MapDataset.mix(documents, weights / weights.sum())
    # Records come from storage, many at a time and ahead; the digits are in memory, and the next
    # batch is made while the device works.
    threads, ahead = (16, 64) if config.data.records else (0, 0)
    stream = mixture.to_iter_dataset(grain.ReadOptions(threads, ahead))
    return pack(stream.filter(fits), config, tokenizer.pad_id)


def _documents(
    source: Source, config: Config, tokenizer: Tokenizer, place: int
) -> grain.MapDataset:
    """One source, reshuffled and written anew every epoch."""
    # Seeds are given, not derived: adding a source must not reorder the others.
    seed = config.seed * 1000 + place
    examples = grain.MapDataset.source(source.examples).seed(seed).shuffle()
    return examples.random_map(_Writer(source, config, tokenizer), seed=seed)


@dataclasses.dataclass(
    frozen=True, repr=False
)  # grain asks for its repr; all examples would be in it
class _Writer:
    source: Source
    config: Config
    tokenizer: Tokenizer

    def __call__(self, example, rng) -> Document:
        c = self.config
        document = build(
            self.source.write(example, rng),
            self.tokenizer,
            c.model,
            text_beside_images=c.loss.text_beside_images,
            with_logvar=c.data.sample_latents,
        )
        return truncate(document, c.data.max_seq_len) if c.data.truncate_text else document
