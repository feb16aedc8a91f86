"""The training stream: sources -> documents -> mixture -> rows -> batches; deterministic, resumable."""

from __future__ import annotations

import functools

import grain
import numpy as np

from monoformer_jax.config import Config, require
from monoformer_jax.data.documents import Document, build, truncate
from monoformer_jax.data.packing import FitsRow, pack
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer


class Batches:
    """Endless host batches of this process.

    Two runs with the same config see the same batches. `iterator` is grain's, and goes into the
    checkpoint.

    Attributes:
      iterator: gives batches of batch_size / process_count rows, see `batch.spec`.
      dropped: documents left out because they are longer than a row, since this process started.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
    ):
        require(
            config.batch_size % process_count == 0,
            f"batch_size={config.batch_size} is not a multiple of the {process_count} processes",
        )
        require(
            config.model.vocab_size >= tokenizer.vocab_size,
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}",
        )
        sources = open_sources(config.data)
        weights = np.array([config.data.mixture[name] for name in sources])
        documents = [
            _documents(source, config, tokenizer, number, process_index, process_count)
            for number, source in enumerate(sources.values())
        ]
        mixture = grain.MapDataset.mix(documents, weights / weights.sum())
        # No threads: the digits are in memory, and the next batch is made while the device works.
        stream = mixture.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        self._fits = FitsRow(config.data.row_length)
        stream = stream.filter(self._fits)
        stream = pack(stream, config, tokenizer.pad_id)
        self.iterator = iter(stream.batch(config.batch_size // process_count, drop_remainder=True))

    @property
    def dropped(self) -> int:
        return self._fits.dropped


def _documents(
    source: Source, config: Config, tokenizer: Tokenizer, number: int, index: int, count: int
) -> grain.MapDataset:
    """One source for ever: reshuffled every epoch, this process's share, written anew each time."""
    # Seeds are given, not derived: adding a source must not reorder the others.
    seed = config.seed * 1000 + number
    examples = grain.MapDataset.source(source.examples).seed(seed).shuffle()[index::count].repeat()
    write = functools.partial(_write, source=source, config=config, tokenizer=tokenizer)
    return examples.random_map(write, seed=seed)


def _write(example, rng, source: Source, config: Config, tokenizer: Tokenizer) -> Document:
    document = build(
        source.write(example, rng),
        tokenizer,
        config.model,
        text_beside_images=config.loss.text_beside_images,
        moments=config.data.moments,
    )
    return truncate(document, config.data.row_length) if config.data.truncate_text else document
