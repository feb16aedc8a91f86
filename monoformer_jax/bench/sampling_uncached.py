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
from monoformer_jax.diffusion.guidance import Guidance, classifier_free_guidance
from monoformer_jax.diffusion.solvers import TimeGrid, make_time_grid, solve
from monoformer_jax.models import monoformer
from monoformer_jax.sampling.image import (
    ImageSpec,
    check_sampling,
    draw_noise,
    make_guidance,
    make_image_spec,
    to_images,
)
from monoformer_jax.sampling.prompts import Parts, pad_batch
from monoformer_jax.sampling.text import row_keys


def generate_images_uncached(
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
    spec = make_image_spec(config, sampling, size, branches=2)
    blank = Image(np.zeros((*size, config.model.channels), np.float32), denoise=True)
    documents = [
        build([*parts, blank], tokenizer, config.model, closing=[])
        for words in prompts
        for parts in (words, [])
    ]
    # Nothing that is painted sees the <|im_end|> after it.
    documents = [{name: x[:-1] for name, x in document.items()} for document in documents]
    block = pad_batch(documents, max(len(d["tokens"]) for d in documents), tokenizer.pad_id)
    block["positions"] = np.broadcast_to(
        np.arange(block["tokens"].shape[1], dtype=np.int32), block["tokens"].shape
    )
    keys = row_keys(seed, len(prompts))
    grid = make_time_grid(sampling.solver, sampling.steps, sampling.shift)
    x = _paint(params, block, keys, grid, make_guidance(sampling), spec)
    return to_images(np.asarray(x), spec)


@functools.partial(jax.jit, static_argnames="spec")
def _paint(
    params: dict,
    block: dict[str, jax.Array],
    keys: jax.Array,
    grid: TimeGrid,
    guidance: Guidance,
    spec: ImageSpec,
) -> jax.Array:
    model = monoformer.bind(spec.model, params)
    mask = monoformer.attention_mask(spec.model, block)
    patch = block["token_types"] == PATCH
    number = jnp.maximum(patch.cumsum(1) - 1, 0)[..., None]  # of each token's patch
    place = jnp.argsort(~patch, axis=1, stable=True)[:, : spec.patches, None]

    def predict(x, t):
        x = jnp.repeat(x, spec.branches, axis=0)
        patches = jnp.where(patch[..., None], jnp.take_along_axis(x, number, axis=1), 0)
        times = jnp.full((len(x), 1), t)
        hidden, _ = model(block | {"patches": patches}, times, mask)
        output = model.image_output(
            jnp.take_along_axis(hidden, place, axis=1),
            jnp.ones((len(x), spec.patches), jnp.int32),
            times,
        )
        predicted, variance = monoformer.split_output(output, spec.model)
        predicted = predicted.reshape(-1, spec.branches, *predicted.shape[1:])
        variance = None if variance is None else variance[:: spec.branches]
        return classifier_free_guidance(predicted, t, guidance, spec.guided), variance

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return draw_noise(keys_now, spec.patches, spec.model.patch_dim)

    x = draw_noise(keys, spec.patches, spec.model.patch_dim)
    return solve(spec.solver, predict, x, grid, draw=draw, clip=spec.clip)[0]
