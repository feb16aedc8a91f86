"""Autoregressive text generation with the key/value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.data.documents import open_text
from monoformer_jax.data.tokenizer import decode_after
from monoformer_jax.errors import require, require_unicode, shorten, whole_number
from monoformer_jax.models import get_model
from monoformer_jax.nn.layers import float32_matmul, full_precision
from monoformer_jax.parallel import padded_rows, to_host, use_mesh
from monoformer_jax.sampling.prompts import SLOTS, Parts, bucket, encode_prompt
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.state import Sequences, prefill, truncate

_CHUNK = 64  # tokens decoded between host transfers; the cache grows by as many
_TEXT = np.uint32(2**31)  # folded into keys; image and step numbers are smaller


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled: one value for all sequences, or one per sequence."""

    temperature: float | Sequence[float] = 0.0  # 0: greedy decoding
    top_k: int | Sequence[int] = 0  # only the k most likely tokens; 0: all
    top_p: float | Sequence[float] = 1.0  # nucleus sampling: cumulative probability; 1: all
    # Logits of tokens that occur in the sequence are divided by this, or multiplied if negative
    # (Keskar et al., arXiv 1909.05858); not those of </s> and <|im_start|>.
    repetition_penalty: float | Sequence[float] = 1.0
    # The text ends before the first of these strings; they may begin with a space and span tokens.
    stop: Sequence[str] = ()

    def __post_init__(self):
        def every(name, fits, what, kinds="iuf"):
            value = getattr(self, name)
            said = f"{name}={shorten(repr(value), 60)}"
            try:
                array = np.asarray(value)
            except ValueError:  # lists of several lengths
                array = np.asarray(None)
            numbers = "whole numbers" if kinds == "iu" else "numbers"
            require(
                array.dtype.kind in kinds, f"{said}: it must be a number, or a list of {numbers}"
            )
            require(bool(np.all(fits(array))), f"{said} must be {what}")

        every("temperature", lambda x: (x >= 0) & np.isfinite(x), "0 (greedy) or more")
        every("top_k", lambda x: (x >= 0) & (x < 2**31), "0 (off) or more", "iu")
        every("top_p", lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (off)")
        every("repetition_penalty", lambda x: (x > 0) & np.isfinite(x), "above 0; 1 is off")
        texts = isinstance(self.stop, list | tuple) and all(isinstance(s, str) for s in self.stop)
        require(texts, f"stop={shorten(repr(self.stop), 60)} is neither a text nor a list of texts")
        require(all(self.stop), "stop: an empty string would end every answer at once")
        for text in self.stop:
            require_unicode(text, "stop")


GREEDY = SamplingParams()


@dataclasses.dataclass
class Completion:
    """Generated continuation of one sequence.

    Attributes:
      tokens: new ids, without </s> and <|im_start|>, and those from the stop string on.
      text: the tokens decoded as the continuation of the prompt, up to the stop string. Prompt + text
        read as one text, unless the prompt ends with an image, </s> or text without loss.
      finish_reason: "end" (</s>), "image" (<|im_start|>), "stop" (stop string), "length" (token
        limit), or "full" (no space in the context for more text, or for the image that it began).
    """

    tokens: list[int]
    text: str = ""
    finish_reason: str = ""


def generate_text(
    sampler: Sampler,
    prompts: Sequence[Parts],
    *,
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    allow_images: bool = True,
) -> list[Completion]:
    """Continues every prompt with text, until </s> or <|im_start|>.

    `session.Session` also generates the image that <|im_start|> begins.

    Args:
      prompts: parts of documents, see `data.documents.build_document`.
      max_tokens: maximum number of new tokens per prompt.
      sampling: see `SamplingParams`.
      seed, first: sequence i is sampled with (seed, first + i), or with seed[i] if a list is given,
        independently of the other sequences (batch-invariant).
      allow_images: whether <|im_start|> may be sampled.

    Raises:
      InputError: an empty prompt, or one that leaves no space in the context.
    """
    check_text(sampler)
    max_tokens = whole_number(max_tokens, "max_tokens", 1)
    documents = [
        encode_prompt(sampler, parts, reserve=1, name=f"prompt {number}")
        for number, parts in enumerate(prompts, 1)
    ]
    count = len(documents)
    keys = text_keys(row_keys(seed, count, first))
    arrays = make_sampling_arrays(sampler, sampling, keys, allow_images)
    # On a mesh, copies of the last prompt pad the batch; they decode no tokens.
    most = np.zeros(padded_rows(count, sampler.mesh), int)
    most[:count] = max_tokens
    documents += documents[-1:] * (len(most) - count)
    with use_mesh(sampler.mesh):
        sequences = prefill(sampler, documents)
        lengths = np.array([len(document["tokens"]) for document in documents])
        before = [open_text(parts, sampler.tokenizer) for parts in prompts]
        before += before[-1:] * (len(most) - count)
        found = continue_text(sampler, sequences, lengths, most, arrays, sampling.stop, before)[2]
    return found[:count]


def check_text(sampler: Sampler) -> None:
    """Raises InputError for a model without a text head."""
    require(
        sampler.config.layout.has_text,
        f"model.kind={sampler.config.model.kind!r} generates images only: for text, use another model; "
        "for an image of every prompt, sample with --paint, or call generate_images",
    )


def continue_text(
    sampler: Sampler,
    sequences: Sequences,
    lengths: np.ndarray,
    most: np.ndarray,
    arrays: SamplingArrays,
    stop: Sequence[str],
    before: Sequence[Sequence[int]],
) -> tuple[Sequences, np.ndarray, list[Completion]]:
    """Decodes until every sequence has ended, in chunks of up to 64 tokens; the cache grows per chunk.

    Args:
      lengths: lengths of the sequences, on the host.
      most: maximum new tokens per sequence; 0 leaves a sequence unchanged.
      before: ids of the text that each sequence continues, see `documents.open_text`.

    Returns:
      The sequences with their completions, including </s> or <|im_start|> but not a stop string;
      their lengths; and one `Completion` per sequence.
    """
    context = sampler.config.data.max_seq_len
    full = (most > 0) & (lengths >= context)
    completions = [Completion([], finish_reason="full" if f else "") for f in full]
    running = (most > 0) & ~full
    while running.any():
        left = np.minimum(most - [len(c.tokens) for c in completions], context - lengths)
        left = np.where(running, left, 0)
        room = min(_CHUNK, bucket(left.max(), 16))
        sequences, tokens, counts = decode_tokens(
            sampler.params, sequences, left, arrays, sampler.config.model, room
        )
        tokens, counts = to_host((tokens, counts))
        kept = np.zeros_like(lengths)
        for b in np.flatnonzero(running):
            new = tokens[b, : counts[b]].tolist()
            kept[b] = _append(
                completions[b], new, int(lengths[b]), int(most[b]), sampler, stop, before[b]
            )
            running[b] = not completions[b].finish_reason
        lengths = lengths + kept
        sequences = truncate(
            sequences, lengths.astype(np.int32), tokens, kept, bucket(lengths.max(), SLOTS)
        )
    return sequences, lengths, completions


def _append(
    c: Completion,
    new: list[int],
    length: int,
    most: int,
    sampler: Sampler,
    stop: Sequence[str],
    before_text: Sequence[int],
) -> int:
    """Adds tokens to a completion and sets finish_reason; returns how many the sequence keeps."""
    tokenizer, context = sampler.tokenizer, sampler.config.data.max_seq_len
    end, kept, before = new[-1], len(new), len(c.tokens)
    if end == tokenizer.im_start_id:
        fits = length + kept + sampler.config.image_tokens + 1 <= context
        c.finish_reason, kept = ("image", kept) if fits else ("full", kept - 1)
    elif end == tokenizer.eos_id:
        c.finish_reason = "end"
    elif length + kept == context:
        c.finish_reason = "full"
    elif before + kept == most:
        c.finish_reason = "length"
    c.tokens += new[:-1] if end in (tokenizer.im_start_id, tokenizer.eos_id) else new
    c.text = decode_after(tokenizer, before_text, c.tokens)
    found = [place for place in (c.text.find(s) for s in stop) if place >= 0]
    if found:
        c.finish_reason, c.text = "stop", c.text[: min(found)]
        while len(decode_after(tokenizer, before_text, c.tokens)) > len(c.text):
            c.tokens.pop()
        kept = len(c.tokens) - before  # negative if the stop string began in an earlier chunk
    return kept


@flax.struct.dataclass
class SamplingArrays:
    """Array form of `SamplingParams` for `decode_tokens`; no setting is a compile-time constant."""

    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    repetition_penalty: jax.Array  # float32 [B]
    keys: jax.Array  # PRNG keys [B]
    allowed: jax.Array  # bool [V], tokens that may be sampled
    stops: jax.Array  # bool [V], tokens that end the text


def row_keys(seed: int | Sequence[int], rows: int, first: int = 0) -> jax.Array:
    """One PRNG key per sequence: from (seed, first + i), or from seed[i] if a list is given."""
    seeds, numbers = [seed] * rows, range(first, first + rows)
    if isinstance(seed, list | tuple | np.ndarray | range):
        seeds, numbers = list(seed), [0] * rows
        require(len(seeds) == rows, f"{len(seeds)} seeds for {rows} rows: give one seed per row")
    seeds = [whole_number(value, "seed", 0, 2**32 - 1) for value in seeds]
    seeds, numbers = np.array(seeds, np.uint32), np.array(numbers, np.uint32)
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, numbers)


def text_keys(keys: jax.Array) -> jax.Array:
    """Keys for sampling text; the unfolded keys are used for the first image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, _TEXT)


def make_sampling_arrays(
    sampler: Sampler, sampling: SamplingParams, keys: jax.Array, allow_images: bool
) -> SamplingArrays:
    """Converts settings to arrays; with `allow_images`, <|im_start|> may be sampled.

    Raises:
      InputError: a list of settings whose length is not the number of sequences.
    """
    rows, tokenizer = len(keys), sampler.tokenizer
    fill = (0, padded_rows(rows, sampler.mesh) - rows)
    arrays = {}
    for name, dtype in (("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32),
                        ("repetition_penalty", np.float32)):  # fmt: skip
        value = np.asarray(getattr(sampling, name), dtype)
        require(value.shape in ((), (rows,)), f"{name} has shape {value.shape} for {rows} rows")
        arrays[name] = np.pad(np.broadcast_to(value, (rows,)), fill, mode="edge")
    keys = keys[np.pad(np.arange(rows), fill, mode="edge")]
    c = sampler.config.model
    vocab = get_model(c).text_head(c, sampler.params).shape[1]
    allowed = np.arange(vocab) < min(c.layout.vocab_size, tokenizer.vocab_size)
    never = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.im_end_id]
    never += [] if allow_images else [tokenizer.im_start_id]
    allowed[[i for i in never if i >= 0]] = False
    stops = np.zeros(vocab, bool)
    stops[[i for i in (tokenizer.eos_id, tokenizer.im_start_id) if i >= 0]] = True
    return SamplingArrays(**arrays, keys=keys, allowed=allowed, stops=stops)


def sample_token(
    logits: jax.Array, seen: jax.Array, keys: jax.Array, arrays: SamplingArrays
) -> jax.Array:
    """Samples the next token, int32 [B]: penalty, temperature, top-k, then top-p.

    Args:
      logits: [B, V].
      seen: bool [B, V].
      keys: PRNG keys for this token, [B].
    """
    penalty = arrays.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen & ~arrays.stops, penalised, logits)
    logits = jnp.where(arrays.allowed, logits, -jnp.inf)
    greedy = logits.argmax(-1)
    warm = arrays.temperature > 0
    logits = logits / jnp.where(warm, arrays.temperature, 1.0)[:, None]
    cuts = (warm & ((arrays.top_k > 0) | (arrays.top_p < 1))).any()
    logits = jax.lax.cond(cuts, lambda x: filter_logits(x, arrays), lambda x: x, logits)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.where(warm, drawn, greedy).astype(jnp.int32)


def filter_logits(logits: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Masks the logits outside top-k and top-p; ties with the last kept token are kept."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    k = jnp.where(arrays.top_k > 0, arrays.top_k, logits.shape[-1])[:, None]
    ordered = jnp.where(rank < k, ordered, -jnp.inf)
    share = jax.nn.softmax(ordered, axis=-1)
    kept = (share.cumsum(-1) - share < arrays.top_p[:, None]) & (ordered > -jnp.inf)
    kept = kept.at[:, 0].set(True)
    lowest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def text_logits(c: Any, params: dict, hidden: jax.Array) -> jax.Array:
    """Text logits, [B, D] -> float32 [B, V]; vocabulary padding has probability 0."""
    head = get_model(c).text_head(c, params)
    logits = float32_matmul(hidden, head.astype(hidden.dtype))
    real = jnp.arange(head.shape[1]) < c.layout.vocab_size
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min)


@functools.partial(jax.jit, static_argnames=("c", "room"))
def decode_tokens(
    params: dict,
    sequences: Sequences,
    most: jax.Array,
    arrays: SamplingArrays,
    c: Any,
    room: int,
) -> tuple[Sequences, jax.Array, jax.Array]:
    """Decodes up to `room` tokens per sequence; each sequence ends at its first stop token.

    Args:
      most: int32 [B], maximum tokens per sequence; 0 leaves a sequence unchanged.
      room: size of the token buffer, and number of cache slots that are added.

    Returns:
      The sequences, which `state.truncate` must shorten; the tokens int32 [B, room]; and the number of
      valid ones including the stop token, int32 [B].
    """
    model, batch = get_model(c), len(most)
    before, everyone = sequences.state.lengths, jnp.arange(batch)

    def more(carry):
        i, running = carry[:2]
        return (i < room) & running.any()

    def step(carry):
        i, running, counts, tokens, seen, state = carry
        keys = jax.vmap(jax.random.fold_in)(arrays.keys, before + i)
        token = sample_token(text_logits(c, params, state.hidden), seen, keys, arrays)
        tokens, counts = tokens.at[:, i].set(token), counts + running
        seen = seen.at[everyone, token].max(running)
        hidden = state.hidden
        with full_precision(c.dtype):
            state = model.decode(c, params, state, token)
        # An ended sequence still runs with the batch, but keeps the hidden state of its last token.
        state = state.replace(hidden=jnp.where(running[:, None], state.hidden, hidden))
        running = running & ~arrays.stops[token] & (counts < most)
        return i + 1, running, counts, tokens, seen, state

    tokens, counts = jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32)
    carry = (
        jnp.int32(0),
        most > 0,
        counts,
        tokens,
        sequences.seen,
        sequences.state.with_room(room),
    )
    _, _, counts, tokens, _, state = jax.lax.while_loop(more, step, carry)
    return Sequences(state, sequences.seen), tokens, counts
