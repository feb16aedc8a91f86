"""Writes text after rows, token by token on the key/value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask
from monoformer_jax.config import Config, ModelConfig
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.errors import require
from monoformer_jax.models import monoformer
from monoformer_jax.sampling.prompts import Parts, bucket, encode_prompt, text_inputs
from monoformer_jax.sampling.state import DecodeState, grow_cache, prefill, truncate

_CHUNK = 64  # tokens between looks at the host, and by which the cache grows
_TEXT = np.uint32(2**31)  # folded into keys; images and their steps have small numbers


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen: a number for all rows, or one for each."""

    temperature: float | Sequence[float] = 0.0  # 0 takes the likeliest token
    top_k: int | Sequence[int] = 0  # only the k likeliest; 0: all
    top_p: float | Sequence[float] = 1.0  # only the likeliest that make up this share
    # Logits of tokens that stand in the row already are divided by this, or multiplied if negative
    # (Keskar et al., arXiv 1909.05858); never those of </s> and <|im_start|>.
    repetition_penalty: float | Sequence[float] = 1.0
    stop: tuple[str, ...] = ()  # text ends before the first of these

    def __post_init__(self):
        def every(name, fits, what):
            value = getattr(self, name)
            require(bool(np.all(fits(np.asarray(value)))), f"{name}={value} must be {what}")

        every("temperature", lambda x: (x >= 0) & np.isfinite(x), "0 (greedy) or more")
        every("top_k", lambda x: x >= 0, "0 (off) or more")
        every("top_p", lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (off)")
        every("repetition_penalty", lambda x: (x > 0) & np.isfinite(x), "above 0; 1 is off")
        require(all(self.stop), "stop: an empty text would end every answer at once")


GREEDY = SamplingParams()


@dataclasses.dataclass
class Completion:
    """What was written after a row.

    Attributes:
      tokens: new ids, without </s> and without <|im_start|>.
      text: of them, without a stop text.
      why: it ended with </s> ("end"), opened an image ("image"), said a stop text ("stop"), has as
        many tokens as it may ("length"), or there is no room for more, or for the image that it
        opened, in the model's context ("full").
    """

    tokens: list[int]
    text: str = ""
    finish_reason: str = ""


def generate_text(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Parts],
    *,
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    paints: bool = True,
) -> list[Completion]:
    """Continues every prompt with text, up to </s> or <|im_start|>.

    A row that opens an image has decided to paint: `interleaved.Session` goes on from there.

    Args:
      prompts: parts of documents, see `data.documents.build`.
      max_tokens: most tokens to add to a prompt.
      seed, first: the draws of row i depend on (seed, first + i), or on row i's own seed where a
        list is given, and not on the other rows.
      paints: whether a row may open an image.

    Raises:
      InputError: an empty prompt, or one that leaves no room in the context.
    """
    require(max_tokens > 0, f"max_tokens={max_tokens} must be above 0")
    documents = [
        encode_prompt(parts, tokenizer, config, room=1, name=f"prompt {number}")
        for number, parts in enumerate(prompts, 1)
    ]
    rows = prefill(params, documents, tokenizer.pad_id, config.model, None)
    lengths = np.array([len(document["tokens"]) for document in documents])
    keys = text_keys(row_keys(seed, len(documents), first))
    choice = make_sampling_arrays(sampling, keys, tokenizer, config.model, paints)
    most = np.full(len(documents), max_tokens)
    return continue_text(params, rows, lengths, most, config, tokenizer, choice, sampling.stop)[2]


def continue_text(
    params: dict,
    rows: DecodeState,
    lengths: np.ndarray,
    most: np.ndarray,
    config: Config,
    tokenizer: Tokenizer,
    choice: SamplingArrays,
    stop: Sequence[str],
) -> tuple[DecodeState, np.ndarray, list[Completion]]:
    """Writes after rows until each has ended; a few dozen tokens at a time in a cache that grows.

    Args:
      lengths: of the rows, on the host.
      most: most new tokens of each row; 0 leaves it as it is.

    Returns:
      The rows with what was written, up to and with </s> or <|im_start|> but without a stop text;
      their lengths; and one `Completion` a row.
    """
    full = (most > 0) & (lengths >= config.data.max_seq_len)
    written = [Completion([], finish_reason="full" if f else "") for f in full]
    going = (most > 0) & ~full
    while going.any():
        left = np.minimum(
            most - [len(w.tokens) for w in written], config.data.max_seq_len - lengths
        )
        left = np.where(going, left, 0)
        room = min(_CHUNK, bucket(left.max(), 16))
        rows, tokens, counts = decode_tokens(params, rows, left, choice, config.model, room)
        tokens, counts = jax.device_get((tokens, counts))
        kept = np.zeros_like(lengths)
        for b in np.flatnonzero(going):
            new = tokens[b, : counts[b]].tolist()
            kept[b] = _add(written[b], new, int(lengths[b]), int(most[b]), config, tokenizer, stop)
            going[b] = not written[b].finish_reason
        lengths = lengths + kept
        rows = truncate(rows, tokens, kept, bucket(lengths.max()))
    return rows, lengths, written


def _add(w: Completion, new: list[int], length: int, most: int, config, tokenizer, stop) -> int:
    """Adds tokens to what was written and notes if it has ended; how many of them the row keeps."""
    end, kept, context = new[-1], len(new), config.data.max_seq_len
    before = len(w.tokens)
    if end == tokenizer.im_start_id:
        fits = length + kept + config.image_tokens + 1 <= context
        w.finish_reason, kept = ("image", kept) if fits else ("full", kept - 1)
    elif end == tokenizer.eos_id:
        w.finish_reason = "end"
    elif length + kept == context:
        w.finish_reason = "full"
    elif before + kept == most:
        w.finish_reason = "length"
    w.tokens += new[:-1] if end in (tokenizer.im_start_id, tokenizer.eos_id) else new
    w.text = tokenizer.decode(w.tokens)
    places = [place for place in (w.text.find(s) for s in stop) if place >= 0]
    if places:
        w.finish_reason, w.text = "stop", w.text[: min(places)]
        while len(tokenizer.decode(w.tokens)) > len(w.text):
            w.tokens.pop()
        kept = len(w.tokens) - before  # below 0 where it began among tokens that were kept before
    return kept


@flax.struct.dataclass
class SamplingArrays:
    """What `write` chooses tokens by; nothing in it is compiled in."""

    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    repetition_penalty: jax.Array  # float32 [B]
    keys: jax.Array  # keys [B]
    allowed: jax.Array  # bool [V]
    stops: jax.Array  # bool [V], tokens that end the text


def row_keys(seed: int | Sequence[int], rows: int, first: int = 0) -> jax.Array:
    """A key for each row: of (seed, first + i), or of row i's own seed if they are given."""
    seeds, numbers = [seed] * rows, range(first, first + rows)
    if not isinstance(seed, int | np.integer):
        seeds, numbers = list(seed), [0] * rows
        require(len(seeds) == rows, f"{len(seeds)} seeds for {rows} rows: give one for each")
    for value in seeds:
        require(0 <= value < 2**32, f"seed={value} is not between 0 and 2**32 - 1")
    seeds, numbers = np.array(seeds, np.uint32), np.array(numbers, np.uint32)
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, numbers)


def text_keys(keys: jax.Array) -> jax.Array:
    """The rows' keys for their text; the keys themselves are for their first image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, _TEXT)


def make_sampling_arrays(
    sampling: SamplingParams, keys: jax.Array, tokenizer: Tokenizer, c: ModelConfig, paints: bool
) -> SamplingArrays:
    """Arrays of the settings; with `paints` the text may end in <|im_start|>.

    Raises:
      InputError: a list of settings that has not one for each row.
    """
    rows = len(keys)
    arrays = {}
    for name, dtype in (("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32),
                        ("repetition_penalty", np.float32)):  # fmt: skip
        value = np.asarray(getattr(sampling, name), dtype)
        require(value.shape in ((), (rows,)), f"{name} has shape {value.shape} for {rows} rows")
        arrays[name] = np.broadcast_to(value, (rows,))
    allowed = np.arange(c.padded_vocab) < c.vocab_size
    never = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.im_end_id]
    never += [] if paints else [tokenizer.im_start_id]
    allowed[[i for i in never if i >= 0]] = False
    stops = np.zeros(c.padded_vocab, bool)
    stops[[i for i in (tokenizer.eos_id, tokenizer.im_start_id) if i >= 0]] = True
    return SamplingArrays(**arrays, keys=keys, allowed=allowed, stops=stops)


def sample_token(
    logits: jax.Array, seen: jax.Array, keys: jax.Array, choice: SamplingArrays
) -> jax.Array:
    """The next token int32 [B]: penalty, temperature, top k, then top p.

    Args:
      logits: [B, V].
      seen: bool [B, V].
      keys: of this token, [B].
    """
    penalty = choice.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen & ~choice.stops, penalised, logits)
    logits = jnp.where(choice.allowed, logits, -jnp.inf)
    greedy = logits.argmax(-1)
    warm = choice.temperature > 0
    logits = logits / jnp.where(warm, choice.temperature, 1.0)[:, None]
    cuts = (warm & ((choice.top_k > 0) | (choice.top_p < 1))).any()
    logits = jax.lax.cond(cuts, lambda x: filter_logits(x, choice), lambda x: x, logits)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.where(warm, drawn, greedy).astype(jnp.int32)


def filter_logits(logits: jax.Array, choice: SamplingArrays) -> jax.Array:
    """Logits without the tokens that top k and top p leave out; ties with the last one stay."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    k = jnp.where(choice.top_k > 0, choice.top_k, logits.shape[-1])[:, None]
    ordered = jnp.where(rank < k, ordered, -jnp.inf)
    share = jax.nn.softmax(ordered, axis=-1)
    kept = (share.cumsum(-1) - share < choice.top_p[:, None]) & (ordered > -jnp.inf)
    kept = kept.at[:, 0].set(True)
    lowest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("c", "room"))
def decode_tokens(
    params: dict,
    rows: DecodeState,
    most: jax.Array,
    choice: SamplingArrays,
    c: ModelConfig,
    room: int,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Writes up to `room` tokens after every row, to a stop at the earliest.

    Args:
      most: int32 [B], most tokens for each row; 0 leaves it as it is.

    Returns:
      The rows in a cache with `room` more slots, for `state.truncate`; the tokens int32 [B, room]; and
      how many of them are real, int32 [B], with the stop.
    """
    model = monoformer.bind(c, params)
    batch, end, starts = len(most), rows.slots, rows.starts
    everyone = jnp.arange(batch)

    def going_on(carry):
        i, writing = carry[:2]
        return (i < room) & writing.any()

    def step(carry):
        i, writing, counts, tokens, hidden, seen, cache = carry
        keys = jax.vmap(jax.random.fold_in)(choice.keys, rows.lengths + i)
        token = sample_token(model.text_logits(hidden), seen, keys, choice)
        tokens, counts = tokens.at[:, i].set(token), counts + writing
        seen = seen.at[everyone, token].max(writing)
        inputs = text_inputs(token[:, None], (rows.lengths + i)[:, None], c)
        stop = jnp.full((batch, 1), end + 1 + i)
        new, cache = model(
            inputs, jnp.zeros((batch, 1)), IntervalMask(starts[:, None], stop), cache
        )
        hidden = jnp.where(writing[:, None], new[:, 0], hidden)
        writing = writing & ~choice.stops[token] & (counts < most)
        return i + 1, writing, counts, tokens, hidden, seen, cache

    tokens, counts = jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32)
    carry = (jnp.int32(0), most > 0, counts, tokens, rows.hidden, rows.seen)
    carry = jax.lax.while_loop(going_on, step, (*carry, grow_cache(rows.cache, room)))
    _, _, counts, tokens, hidden, _, cache = carry
    return rows.replace(cache=cache, hidden=hidden), tokens, counts
