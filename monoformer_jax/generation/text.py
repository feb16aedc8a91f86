"""Continues prompts with text, token by token on the key/value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask
from monoformer_jax.config import Config, ModelConfig
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.generation.prompt import Parts, prefill, stack_prompts, text_inputs
from monoformer_jax.models import monoformer


def generate_text(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Parts],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids of every prompt, up to and with </s> or <|im_start|>, at which it stops.

    A row that ends in <|im_start|> has decided to paint: `image.generate_images` takes it from there.

    Args:
      prompts: parts of documents, see `data.documents.build`.
      max_tokens: most tokens to add to a prompt.
      temperature: 0 takes the likeliest token.
      seed: the draw of row i depends on (seed, i) and not on the other rows.

    Raises:
      InputError: an empty prompt, or one that is too long for the context.
    """
    streams = stack_prompts(prompts, tokenizer, config, room=max_tokens)
    stops = (tokenizer.eos_id, tokenizer.im_start_id)
    never = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.im_end_id)
    static = _Static(config.model, config.max_images, max_tokens, stops, never)
    tokens = _decode(params, streams, jax.random.key(seed), jnp.float32(temperature), static)
    found = []
    for row in np.asarray(tokens).tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    return found


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_decode` is compiled for."""

    model: ModelConfig
    max_images: int
    max_tokens: int
    stops: tuple[int, ...]
    never: tuple[int, ...]


@functools.partial(jax.jit, static_argnames="static")
def _decode(params, streams, key, temperature, static: _Static) -> jax.Array:
    """Tokens [B, max_tokens]; what follows a stop means nothing."""
    model, max_tokens = monoformer.bind(static.model, params), static.max_tokens
    batch, length = streams["tokens"].shape
    hidden, cache, start = prefill(model, streams, length + max_tokens, static.max_images)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))

    def pick(hidden, i):
        logits = model.text_logits(hidden).at[:, jnp.array(static.never)].set(-jnp.inf)
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        drawn = jax.vmap(jax.random.categorical)(keys_now, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)

    def going_on(carry):
        i, _, done, _, _ = carry
        return (i < max_tokens) & ~done.all()

    def step(carry):
        i, hidden, done, tokens, cache = carry
        token = pick(hidden, i)
        tokens = tokens.at[:, i].set(token)
        done = done | jnp.isin(token, jnp.array(static.stops))
        slot = cache.index
        inputs = text_inputs(token[:, None], (slot - start)[:, None], static.model)
        mask = IntervalMask(start[:, None], jnp.broadcast_to(slot + 1, (batch, 1)))
        hidden, cache = model(inputs, jnp.zeros((batch, 1)), mask, cache)
        return i + 1, hidden[:, -1], done, tokens, cache

    tokens = jnp.full((batch, max_tokens), static.stops[0], jnp.int32)
    carry = (jnp.int32(0), hidden, jnp.zeros(batch, bool), tokens, cache)
    return jax.lax.while_loop(going_on, step, carry)[3]
