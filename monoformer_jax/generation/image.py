"""Paints images after prompts: the prompt runs once, each step only the image's own tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask
from monoformer_jax.batch import PATCH, TIME, unpatchify
from monoformer_jax.config import Config, ModelConfig, SamplingConfig
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.diffusion.guidance import guide
from monoformer_jax.diffusion.solvers import SOLVERS, time_grid
from monoformer_jax.generation.prompt import Parts, prefill, stack_prompts
from monoformer_jax.models import monoformer


def generate_images(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Parts],
    *,
    sampling: SamplingConfig,
    seed: int = 0,
    first: int = 0,
) -> np.ndarray:
    """One image a prompt, float32 [B, height, width, C].

    Args:
      prompts: parts of documents; <|im_start|> is added to them.
      sampling: solver, steps and guidance; a guidance of 1 runs no unconditional branch.
      seed, first: the noise of image i depends on (seed, first + i) and not on the batch.

    Raises:
      InputError: an empty prompt, or one that is too long for the context.
    """
    rows = list(prompts)
    if sampling.guidance != 1:
        rows += [[]] * len(prompts)  # what training shows where a prompt is dropped
    streams = stack_prompts(
        rows, tokenizer, config, room=config.image_tokens, closing=[tokenizer.im_start_id]
    )
    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, first + i) for i in range(len(prompts))]
    size, patch = config.data.image_size, config.model.patch_size
    static = _Static(config.model, config.max_images, size // patch, sampling)
    patches = _paint(params, streams, jnp.stack(keys), static)
    return unpatchify(np.asarray(patches), size, size, patch)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_paint` is compiled for."""

    model: ModelConfig
    max_images: int
    side: int  # of the image in patches
    sampling: SamplingConfig


@functools.partial(jax.jit, static_argnames="static")
def _paint(params, streams, keys, static: _Static) -> jax.Array:
    """Patches [B, n, P] of the prompts in the first B rows; any others are their unprompted twins."""
    model, sampling, side = monoformer.bind(static.model, params), static.sampling, static.side
    patch_dim = static.model.patch_dim
    branches = streams["tokens"].shape[0] // len(keys)
    inputs, mask, cache = _image_block(model, streams, side, static.max_images)

    def velocity(x, t):
        # The cache is read and never kept: every evaluation writes the same slots anew.
        x = jnp.tile(jnp.pad(x, ((0, 0), (1, 0), (0, 0))), (branches, 1, 1))
        times = jnp.full((x.shape[0], 1), t)
        hidden, _ = model(inputs | {"patches": x}, times, mask, cache)
        v = model.image_output(hidden, inputs["image_ids"], times)[:, 1:, :patch_dim]
        if branches == 1:
            return v
        interval = (sampling.guidance_low, sampling.guidance_high)
        return guide(*jnp.split(v, 2), t, sampling.guidance, interval)

    shape = (side**2, patch_dim)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return SOLVERS[sampling.solver](velocity, noise, time_grid(sampling.steps, sampling.shift))


def _image_block(model, streams, side: int, max_images: int):
    """Inputs, mask and cache of TIME and PATCH tokens that follow the prompts."""
    batch, length = streams["tokens"].shape
    n = 1 + side**2
    _, cache, start = prefill(model, streams, length + n, max_images)
    stop = jnp.full((batch, n), length + n, jnp.int32).at[:, 0].set(length + 1)
    grid = jnp.stack(jnp.divmod(jnp.arange(side**2), side), -1)
    inputs = {
        "tokens": jnp.zeros((batch, n), jnp.int32),  # not looked at where there is an image
        "kinds": jnp.full((batch, n), PATCH, jnp.int32).at[:, 0].set(TIME),
        "positions": (length - start)[:, None] + jnp.arange(n),
        "image_ids": jnp.ones((batch, n), jnp.int32),
        "grid": jnp.broadcast_to(jnp.pad(grid, ((1, 0), (0, 0))), (batch, n, 2)),
    }
    return inputs, IntervalMask(jnp.broadcast_to(start[:, None], (batch, n)), stop), cache
