"""Painting without the prompt's cache: every step runs the whole document. What the cache is for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import PATCH
from monoformer_jax.config import Config, SamplingConfig
from monoformer_jax.data.documents import Image, build
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.diffusion.guidance import Guidance, guide
from monoformer_jax.diffusion.solvers import Grid, make_grid, solve
from monoformer_jax.generation.image import (
    Canvas,
    check_sampling,
    make_canvas,
    make_guidance,
    noise,
    to_images,
)
from monoformer_jax.generation.streams import Parts, stack
from monoformer_jax.generation.text import row_keys
from monoformer_jax.models import monoformer


def paint_uncached(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Parts],
    *,
    sampling: SamplingConfig,
    seed: int = 0,
) -> np.ndarray:
    """The images of `generate_images` with guidance by text, [B, height, width, C]."""
    check_sampling(config, sampling)
    size = (config.data.image_size,) * 2
    canvas = make_canvas(config, sampling, size, branches=2)
    blank = Image(np.zeros((*size, config.model.channels), np.float32), denoise=True)
    documents = [
        build([*parts, blank], tokenizer, config.model, closing=[])
        for words in prompts
        for parts in (words, [])
    ]
    # Nothing that is painted sees the <|im_end|> after it.
    documents = [{name: x[:-1] for name, x in document.items()} for document in documents]
    block = stack(documents, max(len(d["tokens"]) for d in documents), tokenizer.pad_id)
    block["positions"] = np.broadcast_to(
        np.arange(block["tokens"].shape[1], dtype=np.int32), block["tokens"].shape
    )
    keys = row_keys(seed, len(prompts))
    grid = make_grid(sampling.solver, sampling.steps, sampling.shift)
    x = _paint(params, block, keys, grid, make_guidance(sampling), canvas)
    return to_images(np.asarray(x), canvas)


@functools.partial(jax.jit, static_argnames="canvas")
def _paint(
    params: dict,
    block: dict[str, jax.Array],
    keys: jax.Array,
    grid: Grid,
    guidance: Guidance,
    canvas: Canvas,
) -> jax.Array:
    model = monoformer.bind(canvas.model, params)
    mask = monoformer.attention_mask(canvas.model, block)
    patch = block["kinds"] == PATCH
    number = jnp.maximum(patch.cumsum(1) - 1, 0)[..., None]  # of each token's patch
    place = jnp.argsort(~patch, axis=1, stable=True)[:, : canvas.patches, None]

    def predict(x, t):
        x = jnp.repeat(x, canvas.branches, axis=0)
        patches = jnp.where(patch[..., None], jnp.take_along_axis(x, number, axis=1), 0)
        times = jnp.full((len(x), 1), t)
        hidden, _ = model(block | {"patches": patches}, times, mask)
        output = model.image_output(
            jnp.take_along_axis(hidden, place, axis=1),
            jnp.ones((len(x), canvas.patches), jnp.int32),
            times,
        )
        predicted, variance = monoformer.split_output(output, canvas.model)
        predicted = predicted.reshape(-1, canvas.branches, *predicted.shape[1:])
        variance = None if variance is None else variance[:: canvas.branches]
        return guide(predicted, t, guidance, canvas.guided), variance

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return noise(keys_now, canvas.patches, canvas.model.patch_dim)

    x = noise(keys, canvas.patches, canvas.model.patch_dim)
    return solve(canvas.solver, predict, x, grid, draw=draw, clip=canvas.clip)[0]
