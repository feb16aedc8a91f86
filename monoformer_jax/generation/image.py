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
from monoformer_jax.diffusion import ddpm
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
    model, sampling = monoformer.bind(static.model, params), static.sampling
    predict = predictor(model, streams, len(keys), static.side, static.max_images, sampling)
    shape = (static.side**2, static.model.patch_dim)

    def normal(keys):
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    if sampling.solver in SOLVERS:
        times = time_grid(sampling.steps, sampling.shift)
        return SOLVERS[sampling.solver](lambda x, t: predict(x, t)[0], normal(keys), times)
    schedule = ddpm.make_schedule(sampling.steps)
    if sampling.solver == "ddim":
        return ddpm.ddim(predict, normal(keys), schedule, sampling.clip)

    def draw(step):
        return normal(jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    return ddpm.ancestral(predict, normal(keys), draw, schedule, sampling.clip)


def predictor(
    model: monoformer.MonoFormer,
    streams: dict[str, jax.Array],
    images: int,
    side: int,
    max_images: int,
    sampling: SamplingConfig,
) -> ddpm.Predictor:
    """The model as a function of patches [B, n, P] and t, with the prompts run once and guidance.

    Args:
      streams: of B prompts, and with guidance of as many unprompted twins after them.
      images: B.
      side: of the image in patches.
      max_images: images in a prompt at most.

    Returns:
      (x, t) -> what the image head predicts, guided, and the variance numbers of the prompted rows.
    """
    branches = streams["tokens"].shape[0] // images
    inputs, mask, cache = _image_block(model, streams, side, max_images)
    first, c = model.config.time_tokens, model.config
    guided = 3 * c.patch_size**2 if sampling.guidance_channels == "first_three" else None

    def predict(x, t):
        # The cache is read and never kept: every evaluation writes the same slots anew.
        x = jnp.tile(jnp.pad(x, ((0, 0), (first, 0), (0, 0))), (branches, 1, 1))
        times = jnp.full((x.shape[0], 1), t)
        hidden, _ = model(inputs | {"patches": x}, times, mask, cache)
        output = model.image_output(hidden, inputs["image_ids"], times)[:, first:]
        predicted, variance = monoformer.split_output(output, c)
        if branches == 1:
            return predicted, variance
        interval = (sampling.guidance_low, sampling.guidance_high)
        both = jnp.split(predicted, 2)
        predicted = guide(*both, t, sampling.guidance, interval, guided)
        return predicted, None if variance is None else variance[:images]

    return predict


def _image_block(model, streams, side: int, max_images: int):
    """Inputs, mask and cache of TIME and PATCH tokens that follow the prompts."""
    batch, length = streams["tokens"].shape
    c = model.config
    first, n = c.time_tokens, c.time_tokens + side**2
    _, cache, start = prefill(model, streams, length + n, max_images)
    index = jnp.arange(n)
    sees_all = (index >= first) & c.bidirectional_images
    stop = jnp.broadcast_to(length + jnp.where(sees_all, n, index + 1), (batch, n))
    grid = jnp.stack(jnp.divmod(jnp.arange(side**2), side), -1)
    inputs = {
        "tokens": jnp.zeros((batch, n), jnp.int32),  # not looked at where there is an image
        "kinds": jnp.broadcast_to(jnp.where(index < first, TIME, PATCH), (batch, n)),
        "positions": (length - start)[:, None] + index,
        "image_ids": jnp.ones((batch, n), jnp.int32),
        "denoise": jnp.ones((batch, n), bool),
        "grid": jnp.broadcast_to(jnp.pad(grid, ((first, 0), (0, 0))), (batch, n, 2)),
        "features": jnp.zeros((batch, n, c.feature_dim)),
    }
    return inputs, IntervalMask(jnp.broadcast_to(start[:, None], (batch, n)), stop), cache
