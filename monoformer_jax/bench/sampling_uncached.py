"""Image generation without a KV cache, as a baseline: every step runs the full sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import PATCH, stack
from monoformer_jax.config import SamplingConfig
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.diffusion.guidance import Guidance, classifier_free_guidance
from monoformer_jax.diffusion.solvers import TimeGrid, solve
from monoformer_jax.models import get_model
from monoformer_jax.sampling.image import (
    ImageSpec,
    denoise_settings,
    draw_noise,
    make_guidance,
    make_image_spec,
    to_images,
)
from monoformer_jax.sampling.prompts import Parts
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import row_keys


def generate_images_uncached(
    sampler: Sampler, prompts: Sequence[Parts], *, sampling: SamplingConfig, seed: int = 0
) -> np.ndarray:
    """Same images as `generate_images` with text guidance, float32 [B, height, width, C]."""
    config, tokenizer = sampler.config, sampler.tokenizer
    size, sampling = (config.data.image_size,) * 2, config.image_sampling(sampling)
    spec = make_image_spec(config.model, sampling, size, branches=2)
    blank = Image(np.zeros((*size, config.layout.channels), np.float32), denoise=True)
    documents = [
        build_document([*parts, blank], tokenizer, config.layout, closing=[])
        for words in prompts
        for parts in (words, [])
    ]
    block = stack(documents, max(len(d["tokens"]) for d in documents), tokenizer.pad_id)
    keys = row_keys(seed, len(prompts))
    grid = denoise_settings(sampling)[0]
    x = _denoise(sampler.params, block, keys, grid, make_guidance(sampling), spec)
    return to_images(np.asarray(x), spec)


@functools.partial(jax.jit, static_argnames="spec")
def _denoise(
    params: dict,
    block: dict[str, jax.Array],
    keys: jax.Array,
    grid: TimeGrid,
    guidance: Guidance,
    spec: ImageSpec,
) -> jax.Array:
    model = get_model(spec.model)
    patch = block["token_types"] == PATCH
    number = jnp.maximum(patch.cumsum(1) - 1, 0)[..., None]  # patch index of each token
    place = jnp.argsort(~patch, axis=1, stable=True)[:, : spec.patches, None]

    def predict(x, t):
        x = jnp.repeat(x, spec.branches, axis=0)
        x_t = jnp.where(patch[..., None], jnp.take_along_axis(x, number, axis=1), 0)
        out = model.forward(spec.model, params, block, x_t, jnp.full((len(x), 1), t))
        predicted = jnp.take_along_axis(out.prediction, place, axis=1)
        predicted = predicted.reshape(-1, spec.branches, *predicted.shape[1:])
        variance = out.variance
        if variance is not None:
            variance = jnp.take_along_axis(variance, place, axis=1)[:: spec.branches]
        return classifier_free_guidance(predicted, t, guidance, spec.guided), variance

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return draw_noise(keys_now, spec.patches, spec.layout.patch_dim)

    x = draw_noise(keys, spec.patches, spec.layout.patch_dim)
    return solve(spec.solver, predict, x, grid, draw=draw, clip=spec.clip)[0]
