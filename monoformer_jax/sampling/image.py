"""Paints images after prompts: the prompt runs once, each step only the image's own tokens.

    prefill   <s> draw a seven <|im_start|>       once, for every branch of the guidance
    step      TIME PATCH … PATCH                  written to the same slots of the cache at each one

The branches of an image (the prompt, and less of it) are rows of one batch with prefixes of their own
length. One program is compiled for a batch, a size of image and a bucket of prompt lengths; steps,
guidance and seeds are arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax.attention import IntervalMask
from monoformer_jax.batch import PATCH, TIME, unpatchify
from monoformer_jax.config import Config, ModelConfig, SamplingConfig
from monoformer_jax.data.documents import Document, Features, Image, build
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.guidance import Guidance, classifier_free_guidance
from monoformer_jax.diffusion.solvers import TimeGrid, make_time_grid, solve
from monoformer_jax.models import monoformer
from monoformer_jax.nn.decoder import KVCache
from monoformer_jax.parallel import BATCH, batch_shards, parameter_shardings, use_mesh
from monoformer_jax.sampling.prompts import Parts, bucket, check_size, drop_text, encode_prompt
from monoformer_jax.sampling.state import (
    DecodeState,
    grow_cache,
    init_decode_state,
    prefill,
    shard_batch,
)
from monoformer_jax.sampling.text import row_keys

# (steps that are done, images [B, height, width, C] as the model sees them by now)
Preview = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What `paint` is compiled for, beside the shapes of its arrays."""

    model: ModelConfig
    height: int  # in patches
    width: int
    branches: int  # of the guidance: rows of the prefix for each image
    solver: str
    guided: int | None = None  # how many of the P values are guided; None: all
    clip: bool = False

    @property
    def patches(self) -> int:
        return self.height * self.width


def generate_images(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Parts],
    *,
    sampling: SamplingConfig | None = None,
    size: tuple[int, int] | None = None,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    mesh: Mesh | None = None,
    preview: Preview | None = None,
    every: int = 0,
) -> np.ndarray:
    """One image a prompt, float32 [B, height, width, C].

    Args:
      prompts: parts of documents; <|im_start|> is added to them. A prompt with an image and words
        is an instruction to edit.
      sampling: solver, steps and guidance, the config's unless given. A guidance of 1 runs no
        second branch; `image_guidance` other than 1 runs a third where a prompt has an image.
      size: height and width, the trained size unless given; both multiples of the patch.
      seed, first: the noise of image i depends on (seed, first + i), or on its own seed where a
        list is given; neither on the rest of the batch nor on the devices.
      mesh: cuts the batch over its data and fsdp axes; params must be on the same mesh.
      preview, every: called after every so many steps with the clean images as estimated by then.

    Raises:
      InputError: an empty prompt, one that is too long for the context, a size over the trained
        one, or settings that cannot be.
    """
    sampling = config.sampling if sampling is None else sampling
    check_sampling(config, sampling)
    size = size or (config.data.image_size,) * 2
    check_size(size, config, "the image to paint")
    spec = make_image_spec(config, sampling, size, _branches(prompts, sampling))
    room = config.model.time_tokens + spec.patches
    documents = []
    for number, parts in enumerate(prompts, 1):
        document = encode_prompt(parts, tokenizer, config, room=room, name=f"prompt {number}",
                          closing=[tokenizer.im_start_id])  # fmt: skip
        documents.append(guidance_documents(document, tokenizer, config.model, spec.branches))
    keys = row_keys(seed, len(prompts), first)
    padding = 0 if mesh is None else -len(prompts) % batch_shards(mesh)
    documents += documents[-1:] * padding
    keys = keys[np.minimum(np.arange(len(documents)), len(prompts) - 1)]
    with use_mesh(mesh):
        flat = [document for branches in documents for document in branches]
        state = prefill(params, flat, tokenizer.pad_id, config.model, mesh)
        keys = shard_batch(keys, mesh)
        return denoise_images(
            params, state, keys, len(prompts), spec, sampling, preview=preview, every=every
        )


def check_sampling(config: Config, sampling: SamplingConfig) -> None:
    """Raises InputError where the solver does not fit the objective that was trained."""
    dataclasses.replace(config, sampling=sampling)


def make_image_spec(
    config: Config, sampling: SamplingConfig, size: tuple[int, int], branches: int
) -> ImageSpec:
    p = config.model.patch_size
    guided = 3 * p**2 if sampling.guidance_channels == "first_three" else None
    return ImageSpec(
        config.model, size[0] // p, size[1] // p, branches, sampling.solver, guided, sampling.clip
    )


def _branches(prompts: Sequence[Parts], sampling: SamplingConfig) -> int:
    shown = any(isinstance(part, Image | Features) for parts in prompts for part in parts)
    return guidance_branches(sampling, shown)


def guidance_branches(sampling: SamplingConfig, shown: bool) -> int:
    """How many predictions guidance needs; `shown` tells whether an image stands in a prompt."""
    if shown and sampling.image_guidance != 1:
        return 3
    return 1 if sampling.guidance == 1 else 2


def guidance_documents(
    document: Document, tokenizer: Tokenizer, c: ModelConfig, branches: int
) -> list[Document]:
    """The prompt, its images alone, and nothing, as training shows it where a prompt is dropped."""
    if branches == 1:
        return [document]
    nothing = build([], tokenizer, c, closing=[tokenizer.im_start_id])
    return [document, drop_text(document, tokenizer), nothing][:branches]


def to_images(patches: np.ndarray, spec: ImageSpec) -> np.ndarray:
    p = spec.model.patch_size
    return unpatchify(patches, spec.height * p, spec.width * p, p)


def denoise_images(
    params: dict,
    state: DecodeState,
    keys: jax.Array,
    count: int,
    spec: ImageSpec,
    sampling: SamplingConfig,
    *,
    preview: Preview | None = None,
    every: int = 0,
) -> np.ndarray:
    """Images float32 [count, height, width, C], from noise.

    Args:
      state: prefixes [B * branches] that end in <|im_start|>, the branches of an image together.
      keys: of the images, [B].
      count: images that are wanted; those after them only fill up the batch.
      preview, every: called after every so many steps (0: only after the last one) with the clean
        images as estimated by then.
    """
    grid = make_time_grid(sampling.solver, sampling.steps, sampling.shift)
    guidance = make_guidance(sampling)
    x = draw_noise(keys, spec.patches, spec.model.patch_dim)
    # Placed as `denoise` returns it, or the second call would be compiled anew.
    x = jax.device_put(x, state.lengths.sharding)
    done = 0
    while done < sampling.steps:
        stop = min(done + every, sampling.steps) if every else sampling.steps
        ends = np.int32(done), np.int32(stop)
        x, clean = denoise(params, state, x, keys, grid, guidance, *ends, spec)
        done = stop
        images = to_images(np.asarray(x if done == sampling.steps else clean)[:count], spec)
        if preview is not None:
            preview(done, images)
    return images


def make_guidance(sampling: SamplingConfig) -> Guidance:
    values = (sampling.guidance, sampling.image_guidance, sampling.guidance_low,
              sampling.guidance_high, sampling.guidance_rescale)  # fmt: skip
    return Guidance(*map(np.float32, values))


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw_noise(keys: jax.Array, patches: int, patch_dim: int) -> jax.Array:
    """Normal [B, n, P], of every image's own key."""
    return jax.vmap(lambda key: jax.random.normal(key, (patches, patch_dim)))(keys)


@functools.partial(jax.jit, static_argnames="spec")
def denoise(
    params: dict,
    state: DecodeState,
    x: jax.Array,
    keys: jax.Array,
    grid: TimeGrid,
    guidance: Guidance,
    start: jax.Array,
    stop: jax.Array,
    spec: ImageSpec,
) -> tuple[jax.Array, jax.Array]:
    """Steps start … stop of the grid: patches [B, n, P], and the clean ones that the model sees."""
    model = monoformer.bind(spec.model, params)

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return draw_noise(keys_now, spec.patches, spec.model.patch_dim)

    predict = make_denoiser(model, state, spec, guidance)
    return solve(spec.solver, predict, x, grid, draw=draw, clip=spec.clip, start=start, stop=stop)


def lower_paint(
    config: Config,
    mesh: Mesh,
    images: int,
    prompt_tokens: int,
    sampling: SamplingConfig | None = None,
) -> jax.stages.Lowered:
    """The denoising loop of a batch, from shapes alone, for a mesh that need not be there.

    Args:
      images: in the batch, cut over data and fsdp; parameters are placed as in training.
      prompt_tokens: of the longest prompt.
    """
    sampling = config.sampling if sampling is None else sampling
    c, n = config.model, guidance_branches(sampling, shown=False)
    spec = make_image_spec(config, sampling, (config.data.image_size,) * 2, n)
    shapes = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    placed = parameter_shardings(monoformer.logical_axes(c), shapes, mesh)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed
    )

    def like(x, axis=0):
        where = NamedSharding(mesh, PartitionSpec(*[None] * axis, *BATCH))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    state, slots = jax.eval_shape(lambda: init_decode_state(c, images * n)), bucket(prompt_tokens)
    cache = jax.eval_shape(lambda: KVCache.create(c, images * n, slots))
    cache = KVCache(like(cache.k, 1), like(cache.v, 1), cache.index)
    state = state.replace(cache=cache, lengths=like(state.lengths), hidden=like(state.hidden))
    x = like(jax.ShapeDtypeStruct((images, spec.patches, c.patch_dim), np.float32))
    keys = like(jax.eval_shape(lambda: row_keys(0, images)))
    grid = make_time_grid(sampling.solver, sampling.steps, sampling.shift)
    ends = (np.int32(0), np.int32(sampling.steps))
    with jax.set_mesh(mesh):
        return denoise.lower(params, state, x, keys, grid, make_guidance(sampling), *ends, spec)


def make_denoiser(
    model: monoformer.MonoFormer, state: DecodeState, spec: ImageSpec, guidance: Guidance
) -> ddpm.Predictor:
    """The model as a function of patches [B, n, P] and t, after prefixes that have run already.

    Returns:
      (x, t) -> what the image head predicts, guided, and the variance numbers of the first branch.
    """
    inputs, mask = _image_block(state, spec)
    first, c = spec.model.time_tokens, spec.model
    cache = grow_cache(state.cache, first + spec.patches)

    def branches_of(x):
        return x.reshape(-1, spec.branches, *x.shape[1:])

    def predict(x, t):
        # The cache is read and never kept: every evaluation writes the same slots anew.
        x = jnp.repeat(jnp.pad(x, ((0, 0), (first, 0), (0, 0))), spec.branches, axis=0)
        times = jnp.full((x.shape[0], 1), t)
        hidden, _ = model(inputs | {"patches": x}, times, mask, cache)
        output = model.image_output(hidden, inputs["image_ids"], times)[:, first:]
        predicted, variance = monoformer.split_output(output, c)
        predicted = classifier_free_guidance(branches_of(predicted), t, guidance, spec.guided)
        return predicted, None if variance is None else branches_of(variance)[:, 0]

    return predict


def _image_block(state: DecodeState, spec: ImageSpec) -> tuple[dict[str, jax.Array], IntervalMask]:
    """Inputs and mask of the TIME and PATCH tokens that follow the rows."""
    c, batch = spec.model, len(state.lengths)
    first, n = c.time_tokens, c.time_tokens + spec.patches
    index, ones = jnp.arange(n), jnp.ones((batch, n), jnp.int32)
    positions = jnp.stack(jnp.divmod(jnp.arange(spec.patches), spec.width), -1)
    positions = jnp.pad(positions, ((first, 0), (0, 0)))
    inputs = {
        "tokens": jnp.zeros((batch, n), jnp.int32),  # not looked at where there is an image
        "token_types": jnp.broadcast_to(jnp.where(index < first, TIME, PATCH), (batch, n)),
        "segment_ids": ones,
        "positions": state.lengths[:, None] + index,
        "image_ids": ones,
        "denoise": ones > 0,
        "patch_positions": jnp.broadcast_to(positions, (batch, n, 2)),
        "features": jnp.zeros((batch, n, c.feature_dim)),
    }
    start = jnp.broadcast_to(state.starts[:, None], (batch, n))
    return inputs, IntervalMask(start, state.slots + monoformer.attention_mask(c, inputs).stop)
