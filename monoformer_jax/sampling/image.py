"""Generates images from prompts: one prefill, then denoising steps over the image tokens alone.

    prefill   <s> draw a seven <|im_start|>       once, for every guidance branch
    step      TIME PATCH … PATCH                  written to the same cache slots at every step

The guidance branches of an image (the full prompt, and parts of it) are sequences of one batch, each
with its own prefix length. One program is compiled per batch size, image size and bucket of prompt
lengths; the number of steps, the guidance scales and the seeds are array arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import unpatchify
from monoformer_jax.config import SamplingConfig, TokenLayout
from monoformer_jax.data.documents import Features, Image
from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.guidance import Guidance, classifier_free_guidance
from monoformer_jax.diffusion.objectives import check_solver
from monoformer_jax.diffusion.solvers import TimeGrid, make_time_grid, solve
from monoformer_jax.models import get_model
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import padded_rows, to_host, use_mesh
from monoformer_jax.sampling.prompts import (
    Parts,
    check_length,
    check_size,
    encode_prompt,
    guidance_documents,
    negative_parts,
)
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.state import prefill, shard_batch
from monoformer_jax.sampling.text import row_keys

# (number of steps done, current estimate of the clean images [B, height, width, C])
Preview = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Static arguments that `denoise` is compiled for, in addition to its array shapes."""

    model: Any  # config of the model
    height: int  # in patches
    width: int
    branches: int  # guidance branches: sequences of the prefix per image
    solver: str
    guided: int | None = None  # guidance is applied to the first so many of the P values; None: all
    clip: bool = False

    @property
    def layout(self) -> TokenLayout:
        return self.model.layout

    @property
    def patches(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Number of tokens of the image, including its time token if the model has one."""
        return self.layout.time_tokens + self.patches


def generate_images(
    sampler: Sampler,
    prompts: Sequence[Parts],
    *,
    sampling: SamplingConfig | None = None,
    size: tuple[int, int] | None = None,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    preview: Preview | None = None,
    every: int = 0,
) -> np.ndarray:
    """One image per prompt, float32 [B, height, width, C].

    Args:
      prompts: parts of documents; <|im_start|> is appended to each. A prompt with an image and text
        is an editing instruction.
      sampling: solver, steps and guidance; default: the config's. A guidance of 1 runs no second
        branch; `image_guidance` other than 1 runs a third branch if a prompt has an image.
      size: height and width, multiples of the patch size; default: the trained size.
      seed, first: the noise of image i depends on (seed, first + i), or on seed[i] if a list is
        given; not on the other images of the batch or on the devices (batch-invariant).
      preview, every: `preview` is called every `every` steps with the estimated clean images.

    Raises:
      InputError: an empty prompt, a prompt that is too long for the context, a size above the
        trained one, or incompatible settings.
    """
    config, tokenizer = sampler.config, sampler.tokenizer
    sampling = config.image_sampling(sampling)
    check_solver(config.objective, sampling.solver)
    size = size or (config.data.image_size,) * 2
    check_size(sampler, size, "the image to generate")
    shown = any(isinstance(part, Image | Features) for parts in prompts for part in parts)
    spec = make_image_spec(config.model, sampling, size, guidance_branches(sampling, shown))
    negative = negative_parts(sampler, sampling)
    documents = []
    for number, parts in enumerate(prompts, 1):
        document = encode_prompt(sampler, parts, reserve=spec.tokens, name=f"prompt {number}",
                                 closing=[tokenizer.im_start_id])  # fmt: skip
        branches = guidance_documents(document, tokenizer, config.layout, spec.branches, negative)
        for branch in branches[1:]:
            check_length(sampler, branch, spec.tokens, "the negative prompt")
        documents.append(branches)
    keys = row_keys(seed, len(prompts), first)
    documents += documents[-1:] * (padded_rows(len(prompts), sampler.mesh) - len(prompts))
    keys = keys[np.minimum(np.arange(len(documents)), len(prompts) - 1)]
    with use_mesh(sampler.mesh):
        flat = [document for branches in documents for document in branches]
        state = prefill(sampler, flat, least=0).state
        keys = shard_batch(keys, sampler.mesh)
        return denoise_images(
            sampler.params, state, keys, len(prompts), spec, sampling,
            options=sampler.compiler_options, preview=preview, every=every,
        )  # fmt: skip


def make_image_spec(
    c: Any, sampling: SamplingConfig, size: tuple[int, int], branches: int
) -> ImageSpec:
    """Returns the spec for images of this height and width.

    Args:
      c: config of the model.
    """
    p = c.layout.patch_size
    guided = 3 * p**2 if sampling.guidance_channels == "first_three" else None
    return ImageSpec(
        c, size[0] // p, size[1] // p, branches, sampling.solver, guided, sampling.clip
    )


def guidance_branches(sampling: SamplingConfig, shown: bool) -> int:
    """Number of predictions that guidance needs; `shown` is whether a prompt contains an image."""
    if shown and sampling.image_guidance != 1:
        return 3
    return 1 if sampling.guidance == 1 else 2


def to_images(patches: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """[B, n, P] -> [B, height, width, C]."""
    p = spec.layout.patch_size
    return unpatchify(patches, spec.height * p, spec.width * p, p)


def denoise_images(
    params: dict,
    state: Any,
    keys: jax.Array,
    count: int,
    spec: ImageSpec,
    sampling: SamplingConfig,
    *,
    options: Mapping[str, str] | None = None,
    preview: Preview | None = None,
    every: int = 0,
) -> np.ndarray:
    """Denoises images from noise; returns float32 [count, height, width, C].

    Args:
      state: prefixes [B * branches] that end in <|im_start|>; the branches of an image are adjacent.
      keys: PRNG keys of the images, [B].
      count: number of images to return; the remaining ones are padding of the batch.
      options: see `denoise_program`.
      preview, every: `preview` is called every `every` steps (0: only after the last one) with the
        estimated clean images.
    """
    grid, guidance, *_ = denoise_settings(sampling)
    x = draw_noise(keys, spec.patches, spec.layout.patch_dim)
    # The sharding must be that of the output of `denoise`, or the second call would recompile.
    x = jax.device_put(x, state.lengths.sharding)
    run, done = denoise_program(options or {}), 0
    while done < sampling.steps:
        stop = min(done + every, sampling.steps) if every else sampling.steps
        ends = np.int32(done), np.int32(stop)
        x, clean = run(params, state, x, keys, grid, guidance, *ends, spec)
        done = stop
        images = to_images(to_host(x if done == sampling.steps else clean)[:count], spec)
        if preview is not None:
            preview(done, images)
    return images


def denoise_settings(sampling: SamplingConfig) -> tuple[TimeGrid, Guidance, np.int32, np.int32]:
    """Array arguments of `denoise`; no setting is a compile-time constant."""
    betas = sampling.beta_schedule or "linear"
    grid = make_time_grid(sampling.solver, sampling.steps, sampling.shift, betas)
    return grid, make_guidance(sampling), np.int32(0), np.int32(sampling.steps)


def fid_sampling(c: SamplingConfig) -> SamplingConfig:
    """The settings of images that are scored, which have their own guidance if it is set."""
    if not c.fid_guidance:
        return c
    low, high = c.fid_guidance_low, c.fid_guidance_high
    return dataclasses.replace(c, guidance=c.fid_guidance, guidance_low=low, guidance_high=high)


def make_guidance(sampling: SamplingConfig) -> Guidance:
    values = (sampling.guidance, sampling.image_guidance, sampling.guidance_low,
              sampling.guidance_high, sampling.guidance_rescale)  # fmt: skip
    return Guidance(*map(np.float32, values))


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw_noise(keys: jax.Array, patches: int, patch_dim: int) -> jax.Array:
    """Normal noise [B, n, P] from one key per image."""
    return jax.vmap(lambda key: jax.random.normal(key, (patches, patch_dim)))(keys)


@functools.partial(jax.jit, static_argnames="spec")
def denoise(
    params: dict,
    state: Any,
    x: jax.Array,
    keys: jax.Array,
    grid: TimeGrid,
    guidance: Guidance,
    start: jax.Array,
    stop: jax.Array,
    spec: ImageSpec,
) -> tuple[jax.Array, jax.Array]:
    """Runs steps start … stop of the grid; returns patches [B, n, P] and the estimated clean ones."""

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return draw_noise(keys_now, spec.patches, spec.layout.patch_dim)

    predict = make_denoiser(params, state, spec, guidance)
    return solve(spec.solver, predict, x, grid, draw=draw, clip=spec.clip, start=start, stop=stop)


def denoise_program(options: Mapping[str, str]) -> Callable:
    """`denoise`, compiled with options of the compiler, see `Sampler.compiler_options`."""
    return _with_options(tuple(options.items())) if options else denoise


@functools.cache
def _with_options(options: tuple[tuple[str, str], ...]) -> Callable:
    return jax.jit(denoise.__wrapped__, static_argnames="spec", compiler_options=dict(options))


def make_denoiser(params: dict, state: Any, spec: ImageSpec, guidance: Guidance) -> ddpm.Predictor:
    """Returns the model as a function of patches [B, n, P] and t, conditioned on prefilled prefixes.

    Returns:
      (x, t) -> the guided prediction, and the variance of the first branch.
    """
    c, model = spec.model, get_model(spec.model)
    state = state.with_room(spec.tokens)  # outside the loop, or every step would copy the cache

    def branches_of(x):
        return x.reshape(-1, spec.branches, *x.shape[1:])

    def predict(x, t):
        x = jnp.repeat(x, spec.branches, axis=0)
        times = jnp.full(len(x), t)
        grid = (spec.height, spec.width)
        with full_precision(c.dtype):
            predicted, variance = model.denoise(c, params, state, grid, x, times)
        predicted = classifier_free_guidance(branches_of(predicted), t, guidance, spec.guided)
        return predicted, None if variance is None else branches_of(variance)[:, 0]

    return predict
