"""Packing of documents into rows: each row takes those of a buffer that fill it best."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import grain

from monoformer_jax.batch import Batch, Document, empty, place
from monoformer_jax.config import TokenLayout
from monoformer_jax.data.documents import split_document
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require

_WINDOW = 1000  # examples of a stream in which the unusable ones are counted


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Stands in a stream of documents for an example that cannot be used.

    Attributes:
      reason: a reason of `BadExample`.
      name: which example.
      message: what is wrong with it.
    """

    reason: str
    name: str
    message: str


class SplitToRows(grain.experimental.FlatMapTransform):
    """Splits documents longer than a row, see `documents.split_document`; none of a document with more
    images than `max_images` are returned, where that is not 0."""

    max_fan_out = sys.maxsize  # the number of pieces is not limited

    def __init__(self, length: int, tokenizer: Tokenizer, max_images: int = 0):
        self.length, self.tokenizer, self.max_images = length, tokenizer, max_images

    def flat_map(self, document: Document) -> list[Document]:
        if self.max_images and document["image_ids"].max() > self.max_images:
            return []
        return split_document(document, self.length, self.tokenizer)


class UsableDocuments(grain.IterDataset):
    """The documents of which something fits in a row; counts the others by reason, "too_long" among
    them.

    The counts are part of the state of an iterator, so that a resumed run continues them.

    Attributes:
      counts: {"kept", "cut" (see `SplitToRows`) or a reason: number of examples} of the iterator that
        was used last.
      skipped: the examples that it skipped since this list was cleared, without the documents that are
        too long.
    """

    def __init__(self, documents: grain.IterDataset, to_rows: SplitToRows, max_bad_fraction: float):
        super().__init__(documents)
        self.to_rows, self.max_bad_fraction = to_rows, max_bad_fraction
        self.counts: dict[str, int] = {}
        self.skipped: list[Skipped] = []

    def __iter__(self) -> grain.DatasetIterator:
        return _UsableIterator(iter(self._parent), self)


class _UsableIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.DatasetIterator, dataset: UsableDocuments):
        super().__init__(documents)
        self._dataset = dataset
        self._counts: collections.Counter[str] = collections.Counter()
        self._seen, self._bad = 0, 0  # in the current window

    def __next__(self) -> Document:
        while True:
            document = next(self._parent)
            reason = self._reason(document)
            self._counts[reason] += 1
            self._dataset.counts = self._counts
            if reason in ("kept", "cut"):
                return document
            if reason == "too_long":
                self._check_lengths(document)

    def _reason(self, document: Document | Skipped) -> str:
        bad = isinstance(document, Skipped)
        if self._seen == _WINDOW:
            self._seen, self._bad = 0, 0
        self._seen, self._bad = self._seen + 1, self._bad + bad
        if not bad:
            pieces = self._dataset.to_rows.flat_map(document)
            return "too_long" if not pieces else "kept" if pieces[0] is document else "cut"
        self._dataset.skipped.append(document)
        most = self._dataset.max_bad_fraction
        require(
            self._bad <= most * _WINDOW,
            f"more than data.max_bad_fraction={most:g} of {_WINDOW} examples cannot be used; the last "
            f"is {document.name}: {document.message}",
        )
        return document.reason

    def _check_lengths(self, document: Document) -> None:
        rows, none = self._dataset.to_rows, self._counts["kept"] + self._counts["cut"] == 0
        require(
            not none or self._counts["too_long"] < _WINDOW,
            f"none of the first {_WINDOW} documents fits into data.max_seq_len={rows.length} tokens"
            + (f" and data.max_images={rows.max_images}" if rows.max_images else "")
            + f"; the last has {len(document['tokens'])} tokens and "
            f"{document['image_ids'].max()} images",
        )

    def get_state(self) -> dict[str, Any]:
        state = {"counts": dict(self._counts), "window": [self._seen, self._bad]}
        return state | {"documents": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        # Checkpoints of before December 2026 hold the state of the documents alone.
        self._parent.set_state(state.get("documents", state))
        self._counts = collections.Counter(state.get("counts", {}))
        self._seen, self._bad = state.get("window", (0, 0))


class Pack(grain.IterDataset):
    """Packs documents into batches [rows, length, …] of the batch contract.

    A row takes the oldest document of the buffer, and those of the others that leave the fewest tokens
    empty, with at most `max_images` images. So a document waits for at most `buffer` rows. The last
    batch may have rows of PAD alone.
    """

    def __init__(
        self,
        documents: grain.IterDataset,
        layout: TokenLayout,
        *,
        rows: int,
        length: int,
        buffer: int,
        pad_id: int,
        max_images: int,
    ):
        """Args:
        documents: documents of at most `length` tokens.
        layout: token layout of the model.
        rows: rows per batch.
        length: tokens per row.
        buffer: number of documents from which a row is filled.
        max_images: maximum number of images per row; a document with more raises InputError when
          iterated.
        """
        super().__init__(documents)
        self.rows, self.length, self.buffer, self.max_images = rows, length, buffer, max_images
        self._empty = empty(layout, rows, length, pad_id=pad_id)

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(iter(self._parent), self)

    def assemble(self, chosen: Sequence[Sequence[Document]]) -> Batch:
        """A batch of rows of these documents."""
        batch = {name: values.copy() for name, values in self._empty.items()}
        for number, documents in enumerate(chosen):
            place({name: values[number] for name, values in batch.items()}, documents)
        images = batch["image_ids"].max()
        require(
            images <= self.max_images,
            f"a document has {images} images, but data.max_seq_len={self.length} and data.image_size "
            f"allow {self.max_images} in a row: image_size must be that of the smallest image",
        )
        return batch


class _PackIterator(grain.DatasetIterator):
    """Its state is where the documents were when the oldest of the buffer was read, and which of those
    read since have been packed."""

    def __init__(self, parent: grain.DatasetIterator, pack: Pack):
        super().__init__(parent)
        self._pack = pack
        self._restart([])

    def _restart(self, packed: Iterable[int]) -> None:
        # Number of the document, counted from here; state of the parent before it; document.
        self._buffer: list[tuple[int, Any, Document]] = []
        self._lengths: list[int] = []  # of the buffer's documents, and the images of each
        self._images: list[int] = []
        self._read, self._packed = 0, set(packed)

    def __next__(self) -> Batch:
        rows = [self._next_row() for _ in range(self._pack.rows)]
        if not rows[0]:
            raise StopIteration
        return self._pack.assemble(rows)

    def _next_row(self) -> list[Document]:
        """The documents of a row; none after the last one."""
        while len(self._buffer) < self._pack.buffer:
            state, document = self._parent.get_state(), next(self._parent, None)
            if document is None:
                break
            if self._read not in self._packed:
                self._buffer.append((self._read, state, document))
                self._lengths.append(len(document["tokens"]))
                self._images.append(int(document["image_ids"].max()))
            self._read += 1
        if not self._buffer:
            return []
        chosen = fill(self._lengths, self._pack.length, self._images, self._pack.max_images)
        row = [self._buffer[i] for i in chosen]
        self._packed.update(number for number, _, _ in row)
        for i in reversed(chosen):
            del self._buffer[i], self._lengths[i], self._images[i]
        return [document for _, _, document in row]

    def get_state(self) -> dict[str, Any]:
        if not self._buffer:
            return {"parent": self._parent.get_state(), "packed": []}
        oldest, state, _ = self._buffer[0]
        self._packed = {number for number in self._packed if number > oldest}
        return {"parent": state, "packed": sorted(number - oldest for number in self._packed)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._restart(state["packed"])


def fill(lengths: Sequence[int], room: int, images: Sequence[int], most: int) -> list[int]:
    """Chooses documents that leave the fewest of `room` tokens empty, the first one included.

    Args:
      lengths: tokens of each document, the oldest first.
      images: images of each.
      most: images of the chosen ones together, unless the first alone has more.

    Returns:
      Indices in ascending order; older documents are preferred.
    """
    room, most = room - lengths[0], max(most - images[0], 0)
    fitting = [
        index
        for index in range(1, len(lengths))
        if lengths[index] <= room and images[index] <= most
    ]
    # Bit n of sums[-1][m] says whether some of the documents so far have n tokens and at most m images.
    sums, mask = [[1] * (most + 1)], (1 << room + 1) - 1
    for index in reversed(fitting):
        without, size, n = sums[-1], lengths[index], images[index]
        taken = [bits << size & mask for bits in without[: most + 1 - n]]
        sums.append(without[:n] + [a | b for a, b in zip(without[n:], taken)])
    chosen, left = [0], sums.pop()[most].bit_length() - 1
    for index in fitting:
        before, tokens, fewer = sums.pop(), left - lengths[index], most - images[index]
        if tokens >= 0 and fewer >= 0 and before[fewer] >> tokens & 1:
            chosen.append(index)
            left, most = tokens, fewer
    return chosen
