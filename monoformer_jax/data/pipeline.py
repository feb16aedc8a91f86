"""Data pipeline: sources -> documents -> mixture -> rows -> batches; deterministic and resumable."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from monoformer_jax.batch import Document
from monoformer_jax.config import Config, DataConfig, TokenLayout
from monoformer_jax.data.documents import build_document, describe, draw_prompts, truncate
from monoformer_jax.data.packing import LengthFilter, pack
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import InputError, require


class Batches:
    """Infinite host batches: the rows of the global batch that one process holds.

    The global batch consists of `Config.streams` groups of rows. Each group is packed by its own stream
    from its own share of every source, so the content of a row depends only on the config, the step and
    the row index, not on the number of hosts or of worker processes. A process runs the streams of its
    rows and discards the other rows.

    Attributes:
      iterator: iterator over batches of these rows, see `batch.spec` and `RowIterator`.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        rows: Sequence[int] | None = None,
        workers: int = 0,
    ):
        """Args:
        config: config of the run.
        tokenizer: see `data.tokenizer.open_tokenizer`.
        rows: row indices in ascending order; None: all, 0 to batch_size - 1.
        workers: processes that read and pack; 0: this one does.
        """
        layout, c = config.layout, config.data
        require(
            layout.vocab_size >= tokenizer.vocab_size,
            f"model.vocab_size={layout.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}",
        )
        sources, to_document = open_sources(c, layout.channels), _to_documents(config, tokenizer)
        group = config.batch_size // config.streams
        rows = range(config.batch_size) if rows is None else rows
        needed = sorted({row // group for row in rows})
        streams = {}
        for number in needed:
            documents = _documents(sources, to_document, config, number)
            fits = LengthFilter(c.max_seq_len)
            streams[number] = fits, pack(
                documents.filter(fits), layout, rows=group, length=c.max_seq_len, seed=config.seed,
                bins=c.packing_bins, pad_id=tokenizer.pad_id, max_images=config.max_images,
            )  # fmt: skip
        made = [number * group + i for number in needed for i in range(group)]
        kept = slice(None) if made == list(rows) else [made.index(row) for row in rows]
        self.iterator = RowIterator(streams, kept, workers, ahead=1 + c.packing_bins // group)

    @property
    def dropped(self) -> int:
        """Number of documents dropped as longer than a row, since this process started."""
        return self.iterator.dropped


Stream = tuple[LengthFilter, grain.IterDataset]


class RowIterator:
    """Iterator over rows of several streams, one batch per step. States are per stream, so any process
    can resume a stream, in this process or in worker processes."""

    def __init__(
        self, streams: dict[int, Stream], kept: list[int] | slice, workers: int = 0, ahead: int = 1
    ):
        """Args:
        streams: filter and batches of each stream, by its number.
        kept: the rows to return of those that the streams make.
        workers: processes among which the streams are divided; 0: this one.
        ahead: batches that each worker makes in advance.
        """
        self.dropped = 0
        self._kept, self._workers, self._ahead = kept, min(workers, len(streams)), ahead
        # Each worker has consecutive streams.
        parts = np.array_split(list(streams), max(self._workers, 1))
        self._parts = [_Streams({int(n): streams[n] for n in part}) for part in parts]
        self._running: list[grain.DatasetIterator] | None = None
        self._states: dict[str, Any] | None = None

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._running is None:
            self._running = [iter(self._start(part)) for part in self._parts]
        made = [next(running) for running in self._running]
        self._states = {
            n: state for part in made for n, state in json.loads(part["states"]).items()
        }
        self.dropped = sum(int(part["dropped"]) for part in made)
        groups = [part["batch"] for part in made]
        return {name: np.concatenate([g[name] for g in groups])[self._kept] for name in groups[0]}

    def _start(self, part: _Streams) -> grain.IterDataset:
        if not self._workers:
            return part
        # A stream packs `packing_bins` rows at once: room for them keeps the worker busy meanwhile.
        return in_workers(part, 1, self._ahead)

    def get_state(self) -> dict[str, Any]:
        """Returns the states of this process's streams, {stream number: JSON values}."""
        if self._states is None:
            self._states = {n: s for part in self._parts for n, s in iter(part).get_state().items()}
        return self._states

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Restores `states`, which may include other streams; raises KeyError if one is missing."""
        self.close()
        for part in self._parts:
            part.start = {str(number): states[str(number)] for number in part.streams}
        self._states = {n: state for part in self._parts for n, state in part.start.items()}

    def close(self) -> None:
        """Ends the worker processes."""
        for running in self._running or []:
            running.close()
        self._running = None


class _Streams(grain.IterDataset):
    """Batches of several streams, concatenated. With each come the states after it, since a worker
    process is ahead of what has been taken from it."""

    def __init__(self, streams: dict[int, Stream]):
        super().__init__()
        self.streams = streams
        self.start: dict[str, Any] | None = None  # states to start from

    def __iter__(self) -> grain.DatasetIterator:
        iterators = {str(number): iter(rows) for number, (_, rows) in self.streams.items()}
        return _StreamsIterator(iterators, [fits for fits, _ in self.streams.values()], self.start)


class _StreamsIterator(grain.DatasetIterator):
    def __init__(self, iterators, filters, start):
        super().__init__()
        self._iterators, self._filters = iterators, filters
        if start is not None:
            self.set_state(start)

    def __next__(self) -> dict[str, Any]:
        groups = [next(stream) for stream in self._iterators.values()]
        return {
            "batch": {name: np.concatenate([g[name] for g in groups]) for name in groups[0]},
            "states": json.dumps(self.get_state()),
            "dropped": sum(fits.dropped for fits in self._filters),
        }

    def get_state(self) -> dict[str, Any]:
        return {number: stream.get_state() for number, stream in self._iterators.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        for number, stream in self._iterators.items():
            stream.set_state(states[number])


def in_workers(dataset: grain.IterDataset, workers: int, ahead: int) -> grain.IterDataset:
    """The same elements, made by processes of their own, each up to `ahead` of its own in advance.

    Several workers divide the elements of the MapDataset below, which must be made one by one.
    """
    if not flags.FLAGS.is_parsed():  # grain reads its flags, which only its own programs parse
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    return dataset.mp_prefetch(options, worker_init_fn=_init_worker)


def _init_worker(index: int, count: int) -> None:
    """Makes a worker process end with its parent, and only then: a terminal and Slurm send signals to
    all processes, and the parent must be able to save its state."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def open_stages(config: Config, tokenizer: Tokenizer) -> tuple[Source, Callable]:
    """The source with the most weight, and the function (example, rng) -> document, to time them."""
    sources = open_sources(config.data, config.layout.channels)
    source = sources[max(sources, key=lambda name: config.data.mixture[name])]
    return source, _to_documents(config, tokenizer)(source)


def _to_documents(config: Config, tokenizer: Tokenizer) -> Callable[[Source], _ToDocument]:
    return functools.partial(
        _ToDocument, tokenizer=tokenizer, layout=config.layout, data=config.data,
        text_beside_images=config.loss.text_beside_images,
    )  # fmt: skip


def cores() -> int:
    """Number of cores that this process may use; Slurm divides those of a host."""
    given = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(given(0)) if given else os.cpu_count() or 1


def default_workers(config: Config) -> int:
    """Resolves `Config.data_workers` for this process."""
    if config.data_workers >= 0:
        return config.data_workers
    return 0 if not config.data.records or jax.default_backend() == "cpu" else cores() // 2


def check_streams(config: Config, hosts: int) -> None:
    """Raises InputError if some host would have no stream of its own."""
    fitting = [n for n in range(hosts, config.batch_size + 1) if config.batch_size % n == 0]
    fitting.sort(
        key=lambda n: n % hosts > 0
    )  # multiples first: each host then packs its own rows alone
    hint = f"set --config.data.streams={fitting[0]}" if fitting else f"raise batch_size to {hosts}"
    require(
        hosts <= config.streams,
        f"{hosts} hosts share data.streams={config.streams} of batch_size={config.batch_size}: "
        f"{hint} in a new workdir",
    )


def _documents(
    sources: Mapping[str, Source],
    to_document: Callable[[Source], _ToDocument],
    config: Config,
    number: int,
) -> grain.IterDataset:
    """Documents of one stream: its share of every source, mixed by weight."""
    c = config.data
    weights = np.array([c.mixture[name] for name in sources])
    documents = []
    for index, source in enumerate(sources.values()):
        # Explicit seeds: adding a source must not reorder the others.
        own = config.seed * 1000 + index
        examples = grain.MapDataset.source(source.examples).seed(own).shuffle()
        built = examples.random_map(
            to_document(source), seed=own
        )  # with new random numbers every epoch
        # All streams together read each epoch once, also if there are fewer examples than streams.
        documents.append(built.repeat()[number :: config.streams])
    mixture = grain.MapDataset.mix(documents, weights / weights.sum())
    # Threads hide the latency of storage such as gs://. Local files need none: documents are built in
    # Python, one at a time, and the memory of many threads grows.
    remote = any("://" in str(folder) for folder in c.records.values())
    threads, ahead = (16, 64) if remote else (0, 0)
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
        if not self.layout.has_text and not document["denoise"].any():
            tokens, token_types = document["tokens"], document["token_types"]
            raise InputError(
                "the model learns images only, but the document "
                f"{describe(tokens, token_types, self.tokenizer)!r} has none to generate: give the "
                "sources of such documents weight 0 in data.mixture"
            )
        return truncate(document, c.max_seq_len) if c.truncate_text else document
