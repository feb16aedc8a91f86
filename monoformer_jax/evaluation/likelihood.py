"""Log-likelihoods of texts under a model: batched by length, sharded over its mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax import batch as contract
from monoformer_jax.data.documents import build_document
from monoformer_jax.errors import require
from monoformer_jax.models import get_model
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import padded_rows, spread_batch, to_host, use_mesh
from monoformer_jax.sampling.prompts import bucket
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import check_text, text_logits

Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood:
    """ln p(continuation | <s> context) of token ids, and whether greedy decoding gives it.

    Documents begin with <s>, as in training, and the tokens of images and padding, which a text cannot
    have, have no probability: so converted weights give the likelihoods of the model that they are of.
    One program is compiled per bucket of lengths.
    """

    def __init__(self, sampler: Sampler, rows: int = 16):
        """Args:
        sampler: the model.
        rows: texts of a batch.

        Raises:
          InputError: a model without a text head.
        """
        check_text(sampler)
        self._sampler, self._rows = sampler, padded_rows(rows, sampler.mesh)
        t = sampler.tokenizer
        self._not_text = np.array([t.pad_id, t.image_id, t.im_start_id, t.im_end_id])
        self.most = sampler.config.data.max_seq_len  # tokens of a text, with <s>

    def __call__(
        self, pairs: Sequence[Pair], progress: Callable[[Any], Any] = lambda batches: batches
    ) -> list[tuple[float, bool]]:
        """Scores pairs of (context, continuation), in order.

        A context that is too long loses its first tokens.

        Args:
          progress: wraps the sequence of batches to show progress, such as tqdm.

        Raises:
          InputError: an empty continuation, or one longer than the context of the model.
        """
        rows = [self._row(*pair, number) for number, pair in enumerate(pairs, 1)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list = [None] * len(rows)
        batches = [order[i : i + self._rows] for i in range(0, len(order), self._rows)]
        for numbers in progress(batches):
            scores = self._score([rows[i] for i in numbers])
            for number, score, greedy in zip(numbers, *scores):
                found[number] = (float(score), bool(greedy))
        return found

    def _row(self, context: Sequence[int], continuation: Sequence[int], number: int):
        """The ids after <s>, and the place of the first one that is scored."""
        room = self.most - 1
        require(
            0 < len(continuation) <= room,
            f"text {number} has {len(continuation)} tokens to score: the model's context is "
            f"{self.most} (data.max_seq_len), with <s>",
        )
        ids = [*context, *continuation][-room:]
        return ids, 1 + len(ids) - len(continuation)

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        sampler, config = self._sampler, self._sampler.config
        layout = config.model.layout  # rows of texts have no fields for training on images
        length = bucket(1 + max(len(ids) for ids, _ in rows))
        documents = [build_document([], sampler.tokenizer, layout, closing=ids) for ids, _ in rows]
        empty = contract.empty(layout, length, pad_id=sampler.tokenizer.pad_id)
        documents += [empty] * (self._rows - len(rows))
        batch = contract.stack(documents, length, sampler.tokenizer.pad_id)
        first = np.array([place for _, place in rows] + [length] * (self._rows - len(rows)))
        with use_mesh(sampler.mesh):
            if sampler.mesh is not None:
                batch, first = spread_batch((batch, first), sampler.mesh)
            found = _score(
                config.model, config.max_images, sampler.params, batch, first, self._not_text
            )
        return tuple(x[: len(rows)] for x in to_host(found))

    def rolling(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """ln p of whole texts after <s>; a long one in pieces that see the last token before them."""
        pairs, owners = [], []
        for number, ids in enumerate(texts):
            starts = [0, *range(self.most - 1, len(ids), self.most - 2)]
            for start, end in zip(starts, [*starts[1:], len(ids)]):
                pairs.append((ids[max(start - 1, 0) : start], ids[start:end]))
                owners.append(number)
        scores = [score for score, _ in self(pairs)]
        return np.bincount(owners, scores, minlength=len(texts)).tolist()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    c: Any, images: int, params: dict, batch: dict, first: jax.Array, not_text: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of the log-probabilities from token `first` [B] on, and whether all are the likeliest."""
    with full_precision(c.dtype):
        times = jnp.zeros((len(first), images))
        hidden = get_model(c).forward(c, params, batch, batch["patches"], times).text_hidden

        def of_row(row):  # one by one: logits of a batch take gigabytes
            hidden, targets = row
            logits = text_logits(c, params, hidden).at[:, not_text].set(jnp.finfo(jnp.float32).min)
            chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, 1), logits.argmax(1) == targets

        log_p, likeliest = jax.lax.map(of_row, (hidden[:, :-1], batch["tokens"][:, 1:]))
    places = jnp.arange(1, batch["tokens"].shape[1])
    scored = (places >= first[:, None]) & (batch["segment_ids"][:, 1:] > 0)
    return (log_p * scored).sum(1), (likeliest | ~scored).all(1)
