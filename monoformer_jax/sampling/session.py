"""Text and images in one stream, any number of each: a `Session` holds sequences that generate both.

    session = Session(sampler, rows=2)
    session.append([["draw a seven"], ["two plus three is"]])   # the user's turns
    session.generate(max_tokens=64)                             # [[image], [" five"]]
    session.append([["draw a one"], None])                      # the next turn, of sequence 0 only

A sequence begins an image by emitting <|im_start|>. It then waits until every sequence has stopped
decoding; the images are denoised as one batch, each finished image is appended as clean context
(t = 0), and decoding continues. The </s> at the end of an answer stays in the context, as in training.
Outputs are batch-invariant: they do not depend on the other sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from monoformer_jax.batch import TEXT, Document, concatenate, empty, stack
from monoformer_jax.config import SamplingConfig
from monoformer_jax.data.documents import Image, Part, build_document, open_text
from monoformer_jax.diffusion.objectives import check_solver
from monoformer_jax.errors import require, whole_number
from monoformer_jax.parallel import padded_rows, use_mesh
from monoformer_jax.sampling.image import (
    ImageSpec,
    Preview,
    denoise_images,
    guidance_branches,
    make_image_spec,
)
from monoformer_jax.sampling.prompts import (
    SLOTS,
    Parts,
    bucket,
    check_length,
    check_parts,
    check_size,
    guidance_documents,
    negative_parts,
)
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.state import (
    extend,
    init_sequences,
    prefill,
    shard_batch,
    stack_branches,
)
from monoformer_jax.sampling.text import (
    GREEDY,
    Completion,
    SamplingParams,
    check_text,
    continue_text,
    make_sampling_arrays,
    row_keys,
    text_keys,
)

# (number of steps done, the texts and images of every sequence so far)
ReplyPreview = Callable[[int, list[list[str | np.ndarray]]], None]
_IMAGE = np.uint32(2**31)  # added to the image number, from the second image of a sequence on


class Session:
    """A batch of sequences of interleaved text and images."""

    def __init__(
        self,
        sampler: Sampler,
        rows: int,
        *,
        seed: int | Sequence[int] = 0,
        first: int = 0,
        sampling: SamplingConfig | None = None,
        text: SamplingParams = GREEDY,
        reencode: Callable[[np.ndarray], Part] | None = None,
    ):
        """Args:
        sampler: the model, and the mesh over which the sequences are sharded.
        rows: number of sequences.
        seed, first: sequence i is sampled with (seed, first + i), or with seed[i] if a list is given.
        sampling: image sampling settings; default: the config's.
        text: text sampling settings.
        reencode: converts a generated image [height, width, C] to the part that is its context;
          required for a model with a vision encoder.
        """
        self.sampler, config = sampler, sampler.config
        self.sampling = config.image_sampling(sampling)
        check_solver(config.objective, self.sampling.solver)
        require(
            reencode is not None or not config.layout.feature_dim,
            "this model encodes images with a vision encoder: give the function `reencode`",
        )
        self._reencode = reencode or (lambda pixels: Image(pixels, denoise=False))
        self._rows, size = rows, padded_rows(rows, sampler.mesh)  # padded with empty sequences
        self._keys, self._stop = row_keys(seed, rows, first), text.stop
        if config.layout.has_text:
            self._arrays = make_sampling_arrays(sampler, text, text_keys(self._keys), True)
        self._sequences = init_sequences(config.model, sampler.params, size)
        self._documents = [empty(config.layout, 0) for _ in range(size)]
        self._open: list[list[int]] = [[] for _ in range(size)]  # see `open_text`
        self._generated = np.zeros(size, np.int64)  # number of images generated in each sequence
        self._pending = np.zeros(size, bool)  # whether the sequence has new input to continue from

    def __len__(self) -> int:
        return self._rows

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence, int64 [B]."""
        return self._lengths[: len(self)]

    @property
    def _lengths(self) -> np.ndarray:
        return np.array([len(document["tokens"]) for document in self._documents])

    def document(self, row: int) -> Document:
        """Returns the fields of a sequence, see `batch.FIELDS`."""
        document = self._documents[row]
        require(len(document["tokens"]) > 0, f"row {row} has no tokens yet")
        return document

    def append(self, parts: Sequence[Parts | None]) -> None:
        """Appends texts and images to the sequences; None leaves a sequence unchanged.

        A text after a text that has not ended with </s> continues it.

        Raises:
          InputError: an empty text, an image above the trained size, or a turn that exceeds the
            context. No sequence is changed.
        """
        require(len(parts) == len(self), f"{len(parts)} turns for {len(self)} rows")
        for number, turn in enumerate(parts, 1):
            check_parts(self.sampler, turn or (), f"the turn of row {number}")
        self._extend({b: turn for b, turn in enumerate(parts) if turn is not None})

    def begin_image(self, rows: Sequence[int]) -> None:
        """Appends <|im_start|>, for a model that does not choose the modality itself."""
        self._extend(dict.fromkeys(rows, ()), closing=[self.sampler.tokenizer.im_start_id])

    def generate_text(self, most: Sequence[int]) -> list[Completion]:
        """Decodes up to most[b] tokens in sequence b, until </s>, <|im_start|> or a stop string.

        A sequence that has ended can be continued only after `append`.
        """
        check_text(self.sampler)
        most = np.pad(np.asarray(most), (0, len(self._documents) - len(self)))
        for b in np.flatnonzero((most > 0) & ~self._pending):
            require(False, f"row {b} has nothing to continue: append a turn first")
        with use_mesh(self.sampler.mesh):
            self._sequences, _, completions = continue_text(
                self.sampler, self._sequences, self._lengths, most, self._arrays, self._stop,
                self._open,
            )  # fmt: skip
        tokenizer = self.sampler.tokenizer
        last = {"image": [tokenizer.im_start_id], "end": [tokenizer.eos_id]}
        for b, completion in enumerate(completions):
            reason = completion.finish_reason
            if ids := [*completion.tokens, *last.get(reason, [])]:
                self._add(b, self._piece(b, (), ids))
            self._open[b] = [] if reason in last else [*self._open[b], *completion.tokens]
            if reason:
                self._pending[b] = reason in ("image", "length")
        return completions[: len(self)]

    def generate_images(
        self,
        rows: Sequence[int],
        size: tuple[int, int] | None = None,
        *,
        preview: Preview | None = None,
        every: int = 0,
    ) -> np.ndarray:
        """Generates the images that these sequences have begun: float32 [len(rows), height, width, C].

        They stay in the sequences as clean context, with <|im_end|> after them; `preview` is called as
        by `image.generate_images`.

        Raises:
          InputError: a sequence has begun no image or has no space for one, or a size over the
            trained one.
        """
        sampler, config = self.sampler, self.sampler.config
        size = size or (config.data.image_size,) * 2
        check_size(sampler, size, "the image to generate")
        documents = [self.document(b) for b in rows]
        for b, document in zip(rows, documents):
            begun = document["tokens"][-1] == sampler.tokenizer.im_start_id
            require(bool(begun), f"row {b} has not begun an image")
        shown = any((document["token_types"] > TEXT).any() for document in documents)
        branches = guidance_branches(self.sampling, shown)
        spec = make_image_spec(config.model, self.sampling, size, branches)
        self._check_space(np.isin(np.arange(len(self._documents)), rows) * (spec.tokens + 1))
        # A few batch sizes are compiled: repeats of the last sequence fill up.
        batch = padded_rows(bucket(len(rows), 1), sampler.mesh)
        chosen = np.asarray([*rows, *[rows[-1]] * (batch - len(rows))])
        keys = jax.vmap(_image_key)(self._keys[chosen], self._generated[chosen].astype(np.uint32))
        with use_mesh(sampler.mesh):
            prefix = self._branches(chosen, spec)
            images = denoise_images(
                sampler.params, prefix, shard_batch(keys, sampler.mesh), len(rows), spec,
                self.sampling, options=sampler.compiler_options, preview=preview, every=every,
            )  # fmt: skip
        self._extend({b: [self._reencode(image)] for b, image in zip(rows, images)})
        self._generated[list(rows)] += 1
        return images

    def generate(
        self, max_tokens: int, *, preview: ReplyPreview | None = None, every: int = 0
    ) -> list[list[str | np.ndarray]]:
        """Generates text and images until every sequence with new input has ended.

        Args:
          max_tokens: maximum text tokens per sequence; a sequence that reaches it continues at the
            next call.
          preview, every: `preview` is called every `every` denoising steps with the replies so far,
            including the estimated clean images.

        Returns:
          The new texts and images of each sequence, in order.

        Raises:
          InputError: a sequence with new input has no space left in the context.
        """
        max_tokens = whole_number(max_tokens, "max_tokens", 1)
        self._check_space(self._pending.astype(int))
        replies: list[list[str | np.ndarray]] = [[] for _ in range(len(self))]
        left = np.where(self._pending, max_tokens, 0)[: len(self)]
        while left.any():
            begun = []
            for b, completion in enumerate(self.generate_text(left)):
                image = completion.finish_reason == "image"
                if completion.text:
                    replies[b].append(completion.text)
                if image:
                    begun.append(b)
                left[b] = left[b] - len(completion.tokens) if image else 0
            if not begun:
                continue

            def unfinished(step, images, begun=tuple(begun)):
                now = dict(zip(begun, images))
                preview(step, [[*r, now[b]] if b in now else r for b, r in enumerate(replies)])

            images = self.generate_images(begun, preview=preview and unfinished, every=every)
            for b, image in zip(begun, images):
                replies[b].append(image)
        return replies

    def _piece(self, row: int, parts: Parts, closing: Sequence[int]) -> Document:
        """The document of parts that continue a sequence or begin it."""
        before = self._documents[row]
        return build_document(
            parts, self.sampler.tokenizer, self.sampler.config.layout, closing=closing,
            after=before if len(before["tokens"]) else None, before=self._open[row],
        )  # fmt: skip

    def _add(self, row: int, piece: Document) -> None:
        self._documents[row] = concatenate([self._documents[row], piece])

    def _check_space(self, tokens: np.ndarray) -> None:
        context = self.sampler.config.data.max_seq_len
        for b in np.flatnonzero(self._lengths + tokens > context):
            which = f" in row {b}" if len(self) > 1 else ""
            require(
                False,
                f"the conversation{which} would have {self._lengths[b] + tokens[b]} tokens, but the "
                f"model's context is {context} (data.max_seq_len): start a new one, or shorten it",
            )

    def _extend(self, turns: Mapping[int, Parts], closing: Sequence[int] = ()) -> None:
        """Runs the model on new turns and appends them to their sequences."""
        sampler, layout = self.sampler, self.sampler.config.layout
        pieces = {b: self._piece(b, parts, closing) for b, parts in turns.items()}
        pieces = [pieces.get(b, empty(layout, 0)) for b in range(len(self._documents))]
        counts = np.array([len(piece["tokens"]) for piece in pieces])
        self._check_space(counts)
        if not counts.any():
            return
        # A first turn shares the compiled program of `prefill`; later turns are short.
        length = bucket(counts.max(), 16 if self._lengths.any() else 64)
        block = shard_batch(stack(pieces, length, sampler.tokenizer.pad_id), sampler.mesh)
        slots = bucket((self._lengths + counts).max(), SLOTS)
        with use_mesh(sampler.mesh):
            self._sequences = extend(
                sampler.params, self._sequences, block, sampler.config.model, slots
            )
        for b in np.flatnonzero(counts):
            self._add(b, pieces[b])
            self._open[b] = [] if closing else open_text(turns[b], sampler.tokenizer, self._open[b])
            self._pending[b] = True

    def _branches(self, chosen: np.ndarray, spec: ImageSpec) -> Any:
        """The chosen sequences with all their guidance branches, [len(chosen) * branches]."""
        sampler, states = self.sampler, [self._sequences.state]
        layout = sampler.config.layout
        negative = negative_parts(sampler, self.sampling)
        documents = [
            guidance_documents(self.document(b), sampler.tokenizer, layout, spec.branches, negative)
            for b in chosen
        ]
        for branch in range(1, spec.branches):
            of_all = [branched[branch] for branched in documents]
            for document in of_all:
                check_length(sampler, document, spec.tokens, "the negative prompt")
            states.append(prefill(sampler, of_all).state)
        longest = max(len(document["tokens"]) for branched in documents for document in branched)
        return stack_branches(states, chosen, bucket(longest))


def _image_key(key: jax.Array, number: jax.Array) -> jax.Array:
    """The first image of a sequence uses the sequence's key, as in `image.generate_images`."""
    later = jax.random.fold_in(key, _IMAGE + number)
    return jax.lax.cond(number == 0, lambda: key, lambda: later)
