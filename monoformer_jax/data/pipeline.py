"""Data pipeline: sources -> documents -> mixture -> rows -> batches; deterministic and resumable."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from monoformer_jax.batch import Document
from monoformer_jax.config import Config, DataConfig, TokenLayout
from monoformer_jax.data.documents import (
    build_document,
    describe,
    draw_clean,
    draw_order,
    draw_prompts,
)
from monoformer_jax.data.held_out import check_split, trained_examples
from monoformer_jax.data.packing import Pack, Skipped, SplitToRows, UsableDocuments
from monoformer_jax.data.sources import Source, open_sources
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import BadExample, InputError, require

AHEAD = 4  # batches that each worker makes in advance
_LARGE = 1 << 20  # bytes of an array from which on it passes between processes in shared memory


class Batches:
    """Infinite host batches: the rows of the global batch that one process holds.

    The global batch consists of `Config.streams` groups of rows. Each group is packed by its own stream
    from its own share of every source, so the content of a row depends only on the config, the step and
    the row index, not on the number of hosts or of worker processes. A process runs the streams of its
    rows and discards the other rows.

    Attributes:
      iterator: iterator over batches of these rows, see `batch.spec` and `RowIterator`.
      notices: lines about the sources, such as licences.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        log: Callable[[str], None] | None = None,
    ):
        """Args:
        config: config of the run.
        tokenizer: see `data.tokenizer.open_tokenizer`.
        rows: row indices in ascending order; None: all, 0 to batch_size - 1.
        workers: processes that read and pack; 0: this one does.
        log: is called with a line for each example that is skipped, once.
        """
        layout, c = config.layout, config.data
        require(
            layout.vocab_size >= tokenizer.vocab_size,
            f"model.vocab_size={layout.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}",
        )
        sources, to_document = open_sources(c, layout.channels), _to_documents(config, tokenizer)
        check_split(c, sources)
        self.notices = list(dict.fromkeys(s.notice for s in sources.values() if s.notice))
        group = config.batch_size // config.streams
        rows = range(config.batch_size) if rows is None else rows
        needed = sorted({row // group for row in rows})
        streams = {}
        for number in needed:
            documents = _documents(sources, to_document, config, number)
            to_rows = SplitToRows(c.max_seq_len, tokenizer, c.max_images)
            usable = UsableDocuments(documents, to_rows, c.max_bad_fraction)
            streams[number] = usable, Pack(
                grain.experimental.FlatMapIterDataset(usable, to_rows), layout, rows=group,
                length=c.max_seq_len, buffer=c.packing_buffer, pad_id=tokenizer.pad_id,
                max_images=config.max_images,
            )  # fmt: skip
        made = [number * group + i for number in needed for i in range(group)]
        kept = slice(None) if made == list(rows) else [made.index(row) for row in rows]
        self.iterator = RowIterator(streams, kept, workers, log)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of examples of the run that this process's streams skipped or cut, by reason."""
        return count_skipped(self.iterator.skipped)


def count_skipped(streams: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Sums what streams skipped or cut, by reason; see `RowIterator.skipped`."""
    counts: Counter[str] = sum((Counter(stream) for stream in streams.values()), Counter())
    del counts["kept"]
    return dict(counts)


Stream = tuple[UsableDocuments, grain.IterDataset]


class RowIterator:
    """Iterator over rows of several streams, one batch per step. States are per stream, so any process
    can resume a stream, in this process or in worker processes."""

    def __init__(
        self, streams: dict[int, Stream], kept: list[int] | slice, workers: int = 0,
        log: Callable[[str], None] | None = None,
    ):  # fmt: skip
        """Args:
        streams: documents and batches of each stream, by its number.
        kept: the rows to return of those that the streams make.
        workers: processes among which the streams are divided; 0: this one.
        """
        self._log, self._logged = log, set()
        self._kept, self._workers = kept, min(workers, len(streams))
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
        for reason, name, message in (one for part in made for one in json.loads(part["skipped"])):
            if self._log and name not in self._logged:
                self._logged.add(name)
                self._log(f"skipped {name} ({reason}): {message}")
        groups = [group for part in made for group in part["groups"]]
        return {name: np.concatenate([g[name] for g in groups])[self._kept] for name in groups[0]}

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """{stream number: {reason: number of examples of the run}}. Two processes that share a stream
        skip the same examples."""
        # Checkpoints of before December 2026 hold no counts.
        return {number: state.get("skipped", {}) for number, state in self.get_state().items()}

    def _start(self, part: _Streams) -> grain.IterDataset:
        if not self._workers:
            return part
        if not flags.FLAGS.is_parsed():  # grain reads its flags, which only its own programs parse
            flags.FLAGS.mark_as_parsed()
        # A block of shared memory takes more time than to pickle an array, unless that is large.
        small = grain.experimental.DatasetOptions(min_shm_size=_LARGE)
        part = grain.experimental.WithOptionsIterDataset(part, small)
        options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=AHEAD)
        return part.mp_prefetch(options, worker_init_fn=init_worker)

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
    """Batches of several streams. With them come the states after them, since a worker process is ahead
    of what has been taken from it."""

    def __init__(self, streams: dict[int, Stream]):
        super().__init__()
        self.streams = streams
        self.start: dict[str, Any] | None = None  # states to start from

    def __iter__(self) -> grain.DatasetIterator:
        iterators = {str(number): iter(rows) for number, (_, rows) in self.streams.items()}
        return _StreamsIterator(iterators, [docs for docs, _ in self.streams.values()], self.start)


class _StreamsIterator(grain.DatasetIterator):
    def __init__(self, iterators, documents: list[UsableDocuments], start):
        super().__init__()
        self._iterators, self._documents = iterators, documents
        if start is not None:
            self.set_state(start)

    def __next__(self) -> dict[str, Any]:
        return {
            "groups": [next(stream) for stream in self._iterators.values()],
            "states": json.dumps(self.get_state()),
            "skipped": json.dumps(self._take_skipped()),
        }

    def _take_skipped(self) -> list[tuple[str, ...]]:
        """The examples that were skipped since the last batch."""
        examples = [dataclasses.astuple(x) for d in self._documents for x in d.skipped]
        for documents in self._documents:
            documents.skipped.clear()
        return examples

    def get_state(self) -> dict[str, Any]:
        # The state of a stream is from before it packed its open rows, and so are the counts in it:
        # those to read stand beside it.
        streams = zip(self._iterators.items(), self._documents)
        return {n: s.get_state() | {"skipped": dict(docs.counts)} for (n, s), docs in streams}

    def set_state(self, states: dict[str, Any]) -> None:
        for number, stream in self._iterators.items():
            stream.set_state({k: v for k, v in states[number].items() if k != "skipped"})


def init_worker(*_: int) -> None:
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
    numbered = dataclasses.replace(source, examples=_Numbered(source.examples))
    return numbered, _to_documents(config, tokenizer)(source, name="the source")


def _to_documents(config: Config, tokenizer: Tokenizer) -> Callable[..., _ToDocument]:
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
    to_document: Callable[..., _ToDocument],
    config: Config,
    number: int,
) -> grain.IterDataset:
    """Documents of one stream: its share of every source, mixed by weight."""
    c = config.data
    weights = np.array([c.mixture[name] for name in sources])
    documents = []
    for index, (name, source) in enumerate(sources.items()):
        # Explicit seeds: adding a source must not reorder the others.
        own = config.seed * 1000 + index
        examples = grain.MapDataset.source(_Numbered(source.examples)).seed(own).shuffle()
        examples = trained_examples(c, name, examples)
        # With new random numbers every epoch.
        built = examples.random_map(to_document(source, name=name), seed=own)
        # All streams together read each epoch once, also if there are fewer examples than streams.
        documents.append(built.repeat()[number :: config.streams])
    mixture = grain.MapDataset.mix(documents, weights / weights.sum())
    # Threads hide the latency of storage such as gs://. Local files need none: documents are built in
    # Python, one at a time, and the memory of many threads grows.
    remote = any("://" in str(folder) for folder in c.records.values())
    threads, ahead = (16, 64) if remote else (0, 0)
    return mixture.to_iter_dataset(grain.ReadOptions(threads, ahead))


class _Numbered(Sequence):
    """(number, example), or (number, error) of an example that cannot be read."""

    def __init__(self, examples: Sequence):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number):
        try:
            return number, self._examples[number]
        except (BadExample, OSError) as error:
            return number, error

    def __repr__(self) -> str:
        return f"{len(self)} examples"


# repr=False: grain logs the repr, which would contain all examples.
@dataclasses.dataclass(frozen=True, repr=False)
class _ToDocument:
    source: Source
    tokenizer: Tokenizer
    layout: TokenLayout
    data: DataConfig
    text_beside_images: bool
    name: str

    def __call__(self, numbered: tuple[int, Any], rng) -> Document | Skipped:
        c, (number, example) = self.data, numbered
        try:
            if isinstance(example, Exception):
                raise example
            parts = self.source.to_parts(example, rng)
        except (BadExample, OSError) as error:
            reason = getattr(error, "reason", "unreadable")
            return Skipped(reason, f"example {number} of {self.name}", str(error))
        parts = draw_clean(draw_order(parts, rng, c.image_first), rng, c.clean_images)
        parts = draw_prompts(parts, rng, c.prompt_dropout, c.end_of_prompt)
        document = build_document(
            parts, self.tokenizer, self.layout, text_beside_images=self.text_beside_images,
            noised_copies=c.noised_copies,
        )  # fmt: skip
        if not self.layout.has_text and not document["denoise"].any():
            tokens, token_types = document["tokens"], document["token_types"]
            raise InputError(
                "the model learns images only, but the document "
                f"{describe(tokens, token_types, self.tokenizer)!r} has none to generate: give the "
                "sources of such documents weight 0 in data.mixture"
            )
        return document
