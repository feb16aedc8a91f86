"""Text and images in one stream, any number of each: a `Session` holds rows that write and paint.

    session = Session(config, params, tokenizer, rows=2)
    session.add([["draw a seven"], ["two plus three is"]])   # what the user says
    session.reply(max_tokens=64)                             # [[Image(…)], [" five"]]
    session.add([["draw a one"], None])                      # the next turn of row 0 alone

A row opens an image by writing <|im_start|>. It then waits until every row has stopped writing; those
that opened an image are painted together, each finished image is read once more as clean context
(t = 0), and they write on. </s> stays where an answer has ended, as in training. A row gets the same
tokens and images whatever it shares the batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from monoformer_jax.batch import TEXT
from monoformer_jax.config import Config, SamplingConfig
from monoformer_jax.data.documents import Document, Image, Part, build
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require
from monoformer_jax.parallel import batch_shards, use_mesh
from monoformer_jax.sampling.image import (
    Preview,
    check_sampling,
    denoise_images,
    guidance_branches,
    guidance_documents,
    make_image_spec,
)
from monoformer_jax.sampling.prompts import Parts, bucket, check_parts, check_size, pad_batch
from monoformer_jax.sampling.state import (
    DecodeState,
    extend,
    init_decode_state,
    prefill,
    shard_batch,
    stack_branches,
)
from monoformer_jax.sampling.text import (
    GREEDY,
    Completion,
    SamplingParams,
    continue_text,
    make_sampling_arrays,
    row_keys,
    text_keys,
)

# (steps that are done, the texts and images of every row by now)
ReplyPreview = Callable[[int, list[list[str | np.ndarray]]], None]
_IMAGE = np.uint32(2**31)  # added to the number of an image, from a row's second on


class Session:
    """Rows of one batch, each with its own stream of text and images."""

    def __init__(
        self,
        config: Config,
        params: dict,
        tokenizer: Tokenizer,
        rows: int,
        *,
        seed: int | Sequence[int] = 0,
        first: int = 0,
        sampling: SamplingConfig | None = None,
        text: SamplingParams = GREEDY,
        look: Callable[[np.ndarray], Part] | None = None,
        mesh: Mesh | None = None,
    ):
        """Args:
        rows: how many streams.
        seed, first: row i draws from (seed, first + i), or from its own seed where a list is given.
        sampling: of the images, the config's unless given.
        text: how tokens are chosen.
        look: what an image [height, width, C] that the model has painted is to its context; needed
          for a model that looks through a vision encoder.
        mesh: cuts the rows, which it must divide, over its data and fsdp axes.
        """
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.sampling = config.sampling if sampling is None else sampling
        check_sampling(config, self.sampling)
        require(
            look is not None or not config.model.feature_dim,
            "this model looks at images through a vision encoder: give the function `look`",
        )
        self._look = look or (lambda pixels: Image(pixels, denoise=False))
        self._mesh, self._stop = mesh, text.stop
        self._keys = row_keys(seed, rows, first)
        self._choice = make_sampling_arrays(
            text, text_keys(self._keys), tokenizer, config.model, True
        )
        self._state: DecodeState = init_decode_state(config.model, rows)
        self._lengths = np.zeros(rows, np.int64)
        self._pieces: list[list[Document]] = [[] for _ in range(rows)]
        self._painted = np.zeros(rows, np.int64)
        self._asked = np.zeros(rows, bool)  # something stands there to be continued
        self._cut = 1 if mesh is None else batch_shards(mesh)
        require(rows % self._cut == 0, f"{rows} rows cannot be cut over {self._cut} devices")

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [B]."""
        return self._lengths.copy()

    def document(self, row: int) -> Document:
        """Everything that stands in a row, as streams of the batch contract."""
        pieces = self._pieces[row]
        require(bool(pieces), f"row {row} has no tokens yet")
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def append(self, parts: Sequence[Parts | None]) -> None:
        """Puts texts and images after the rows; None leaves a row alone.

        Raises:
          InputError: an empty text, an image over the trained size, or one row is full. Then no row
            is changed.
        """
        require(len(parts) == len(self), f"{len(parts)} turns for {len(self)} rows")
        for number, turn in enumerate(parts, 1):
            check_parts(turn or (), self.config, f"the turn of row {number}")
        self._extend(
            [None if turn is None else self._piece(b, turn) for b, turn in enumerate(parts)]
        )

    def begin_image(self, rows: Sequence[int]) -> None:
        """Puts <|im_start|> after these rows, for a model that does not decide itself to paint."""
        self._extend([self._piece(b, [], [self.tokenizer.im_start_id]) if b in rows else None
                      for b in range(len(self))])  # fmt: skip

    def generate_text(self, most: Sequence[int]) -> list[Completion]:
        """Writes up to most[b] tokens after row b, to </s>, <|im_start|> or a stop text.

        A row that has ended is continued only after something was added to it.
        """
        for b in np.flatnonzero((np.asarray(most) > 0) & ~self._asked):
            require(False, f"row {b} has nothing to continue: add something first")
        with use_mesh(self._mesh):
            self._state, self._lengths, written = continue_text(
                self.params, self._state, self._lengths, np.asarray(most), self.config,
                self.tokenizer, self._choice, self._stop,
            )  # fmt: skip
        for b, w in enumerate(written):
            last = {"image": [self.tokenizer.im_start_id], "end": [self.tokenizer.eos_id]}
            if ids := [*w.tokens, *last.get(w.finish_reason, [])]:
                self._pieces[b].append(self._text(ids))
            if w.finish_reason:
                self._asked[b] = w.finish_reason in ("image", "length")
        return written

    def generate_images(
        self,
        rows: Sequence[int],
        size: tuple[int, int] | None = None,
        *,
        preview: Preview | None = None,
        every: int = 0,
    ) -> np.ndarray:
        """Paints the images that these rows have opened: float32 [len(rows), height, width, C].

        They stay in the rows as clean context, with <|im_end|> after them; `preview` is called as by
        `generate_images`.

        Raises:
          InputError: a row has no open image or no room for one, or a size over the trained one.
        """
        size = size or (self.config.data.image_size,) * 2
        check_size(size, self.config, "the image to paint")
        documents = [self.document(b) for b in rows]
        for b, document in zip(rows, documents):
            opened = document["tokens"][-1] == self.tokenizer.im_start_id
            require(bool(opened), f"row {b} has not opened an image")
        shown = any((document["token_types"] > TEXT).any() for document in documents)
        spec = make_image_spec(
            self.config, self.sampling, size, guidance_branches(self.sampling, shown)
        )
        room = self.config.model.time_tokens + spec.patches + 1
        self._check_room(np.where(np.isin(np.arange(len(self)), rows), room, 0))
        # A few batch sizes are compiled: repeats of the last row fill up.
        batch = -(-bucket(len(rows), 1) // self._cut) * self._cut
        chosen = np.asarray([*rows, *[rows[-1]] * (batch - len(rows))])
        keys = jax.vmap(_image_key)(self._keys[chosen], self._painted[chosen].astype(np.uint32))
        with use_mesh(self._mesh):
            prefix = self._branches(chosen, spec.branches)
            keys = shard_batch(keys, self._mesh)
            images = denoise_images(
                self.params, prefix, keys, len(rows), spec, self.sampling, preview=preview,
                every=every,
            )  # fmt: skip
        pieces: list[Document | None] = [None] * len(self)
        for b, image in zip(rows, images):
            piece = build([self._look(image)], self.tokenizer, self.config.model,
                          closing=[])  # fmt: skip
            # <s> and <|im_start|> stand there already.
            pieces[b] = {name: stream[2:] for name, stream in piece.items()}
            self._painted[b] += 1
        self._extend(pieces)
        return images

    def generate(
        self, max_tokens: int, *, preview: ReplyPreview | None = None, every: int = 0
    ) -> list[list[str | np.ndarray]]:
        """Writes and paints until every row that was spoken to has ended.

        Args:
          max_tokens: most tokens of text a row; a row that is stopped by it goes on when asked again.
          preview, every: called after every so many steps of an image with what this returns, in
            which the images that are under way stand as estimated by then.

        Returns:
          The new texts and images of each row, in order.

        Raises:
          InputError: a row that was spoken to has no room for a single token.
        """
        require(max_tokens > 0, f"max_tokens={max_tokens} must be above 0")
        self._check_room(self._asked.astype(int))
        replies: list[list[str | np.ndarray]] = [[] for _ in range(len(self))]
        left = np.where(self._asked, max_tokens, 0)
        while left.any():
            opened = []
            for b, w in enumerate(self.generate_text(left)):
                if w.text:
                    replies[b].append(w.text)
                if w.finish_reason == "image":
                    opened.append(b)
                left[b] = left[b] - len(w.tokens) if w.finish_reason == "image" else 0
            if not opened:
                continue

            def unfinished(step, images, opened=tuple(opened)):
                now = dict(zip(opened, images))
                preview(step, [[*r, now[b]] if b in now else r for b, r in enumerate(replies)])

            images = self.generate_images(opened, preview=preview and unfinished, every=every)
            for b, image in zip(opened, images):
                replies[b].append(image)
        return replies

    def _text(self, ids: Sequence[int]) -> Document:
        document = build([], self.tokenizer, self.config.model, closing=ids)
        return {name: stream[1:] for name, stream in document.items()}  # without <s>

    def _piece(self, row: int, parts: Parts, closing: Sequence[int] = ()) -> Document:
        """Parts as they go after a row, of which <s> is the first token."""
        document = build(parts, self.tokenizer, self.config.model, closing=closing)
        begun = 1 if self._pieces[row] else 0
        return {name: stream[begun:] for name, stream in document.items()}

    def _check_room(self, tokens: np.ndarray) -> None:
        context = self.config.data.max_seq_len
        for b in np.flatnonzero(self._lengths + tokens > context):
            which = f" in row {b}" if len(self) > 1 else ""
            require(
                False,
                f"the conversation{which} would come to {self._lengths[b] + tokens[b]} tokens, but the "
                f"model's context is {context} (data.max_seq_len): start a new one, or say less",
            )

    def _extend(self, pieces: Sequence[Document | None]) -> None:
        counts = np.array([0 if piece is None else len(piece["tokens"]) for piece in pieces])
        self._check_room(counts)
        if not counts.any():
            return
        nothing = {k: v[:0] for k, v in self._text([self.tokenizer.bos_id]).items()}
        # A first turn shares the program of `prefill`; later ones are short.
        slots = bucket(counts.max(), 16 if self._lengths.any() else 64)
        pieces = [nothing if piece is None else piece for piece in pieces]
        block = pad_batch(pieces, slots, self.tokenizer.pad_id)
        lengths = self._lengths + counts
        with use_mesh(self._mesh):
            self._state = extend(
                self.params, self._state, shard_batch(block, self._mesh), self.config.model,
                bucket(lengths.max()),
            )  # fmt: skip
        self._lengths = lengths
        for b in np.flatnonzero(counts):
            self._pieces[b].append(pieces[b])
            self._asked[b] = True

    def _branches(self, chosen: np.ndarray, branches: int) -> DecodeState:
        """The chosen rows with the other branches of their guidance, [len(chosen) * branches]."""
        others, index = [], [chosen]
        for branch in range(1, branches):
            documents = [
                guidance_documents(self.document(b), self.tokenizer, self.config.model, branches)[
                    branch
                ]
                for b in chosen
            ]
            others.append(
                prefill(
                    self.params, documents, self.tokenizer.pad_id, self.config.model, self._mesh
                )
            )
            index.append(np.arange(len(chosen)))
        slots = bucket(self._lengths[chosen].max())
        return stack_branches([self._state, *others], index, slots)


def _image_key(key: jax.Array, number: jax.Array) -> jax.Array:
    """The first image of a row gets the row's own key, as in `generate_images`."""
    later = jax.random.fold_in(key, _IMAGE + number)
    return jax.lax.cond(number == 0, lambda: key, lambda: later)
