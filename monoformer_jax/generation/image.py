"""Paints images after prompts: the prompt runs once, each step only the image's own tokens.

    prefill   <s> draw a seven <|im_start|>       once, for every branch of the guidance
    step      TIME PATCH … PATCH                  written to the same slots of the cache at each one

The branches of an image (the prompt, and less of it) are rows of one batch with prefixes of their own
length. One program is compiled for a batch, a size of image and a bucket of prompt lengths; steps,
guidance and seeds are arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

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
from monoformer_jax.diffusion.guidance import Guidance, guide
from monoformer_jax.diffusion.solvers import Grid, make_grid, solve
from monoformer_jax.generation.rows import Rows, no_rows, place, prefill, with_room
from monoformer_jax.generation.streams import Parts, bucket, check_size, prompt, without_text
from monoformer_jax.generation.text import row_keys
from monoformer_jax.models import monoformer
from monoformer_jax.nn.decoder import KVCache
from monoformer_jax.parallel import BATCH, parameter_shardings

# (steps that are done, images [B, height, width, C] as the model sees them by now)
Preview = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Canvas:
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
    canvas = make_canvas(config, sampling, size, _branches(prompts, sampling))
    room = config.model.time_tokens + canvas.patches
    documents = []
    for number, parts in enumerate(prompts, 1):
        document = prompt(parts, tokenizer, config, room=room, name=f"prompt {number}",
                          closing=[tokenizer.im_start_id])  # fmt: skip
        documents.append(branch_documents(document, tokenizer, config.model, canvas.branches))
    keys = row_keys(seed, len(prompts), first)
    padding = 0 if mesh is None else -len(prompts) % (mesh.shape["data"] * mesh.shape["fsdp"])
    documents += documents[-1:] * padding
    keys = keys[np.minimum(np.arange(len(documents)), len(prompts) - 1)]
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        flat = [document for branches in documents for document in branches]
        rows = prefill(params, flat, tokenizer.pad_id, config.model, mesh)
        walk = paint_steps(params, rows, place(keys, mesh), canvas, sampling, every)
        for step, x, clean in walk:
            images = x if step == sampling.steps else clean
            images = to_images(np.asarray(images)[: len(prompts)], canvas)
            if preview is not None:
                preview(step, images)
    return images


def check_sampling(config: Config, sampling: SamplingConfig) -> None:
    """Raises InputError where the solver does not fit the objective that was trained."""
    dataclasses.replace(config, sampling=sampling)


def make_canvas(
    config: Config, sampling: SamplingConfig, size: tuple[int, int], branches: int
) -> Canvas:
    p = config.model.patch_size
    guided = 3 * p**2 if sampling.guidance_channels == "first_three" else None
    return Canvas(
        config.model, size[0] // p, size[1] // p, branches, sampling.solver, guided, sampling.clip
    )


def _branches(prompts: Sequence[Parts], sampling: SamplingConfig) -> int:
    shown = any(isinstance(part, Image | Features) for parts in prompts for part in parts)
    return branch_count(sampling, shown)


def branch_count(sampling: SamplingConfig, shown: bool) -> int:
    """How many predictions guidance needs; `shown` tells whether an image stands in a prompt."""
    if shown and sampling.image_guidance != 1:
        return 3
    return 1 if sampling.guidance == 1 else 2


def branch_documents(
    document: Document, tokenizer: Tokenizer, c: ModelConfig, branches: int
) -> list[Document]:
    """The prompt, its images alone, and nothing, as training shows it where a prompt is dropped."""
    if branches == 1:
        return [document]
    nothing = build([], tokenizer, c, closing=[tokenizer.im_start_id])
    return [document, without_text(document, tokenizer), nothing][:branches]


def to_images(patches: np.ndarray, canvas: Canvas) -> np.ndarray:
    p = canvas.model.patch_size
    return unpatchify(patches, canvas.height * p, canvas.width * p, p)


def paint_steps(
    params: dict,
    rows: Rows,
    keys: jax.Array,
    canvas: Canvas,
    sampling: SamplingConfig,
    every: int = 0,
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Paints, stopping after every so many steps (0: only at the end).

    Args:
      rows: prefixes [B * branches] that end in <|im_start|>, the branches of an image together.
      keys: of the images, [B].

    Yields:
      Steps done, patches [B, n, P] as they are, and as the clean image is estimated.
    """
    grid = make_grid(sampling.solver, sampling.steps, sampling.shift)
    guidance = make_guidance(sampling)
    # Where what comes back will lie, or the second call would be compiled anew.
    x = jax.device_put(noise(keys, canvas.patches, canvas.model.patch_dim), rows.lengths.sharding)
    done = 0
    while done < sampling.steps:
        stop = min(done + every, sampling.steps) if every else sampling.steps
        x, clean = paint(
            params, rows, x, keys, grid, guidance, np.int32(done), np.int32(stop), canvas
        )
        done = stop
        yield done, x, clean


def make_guidance(sampling: SamplingConfig) -> Guidance:
    values = (sampling.guidance, sampling.image_guidance, sampling.guidance_low,
              sampling.guidance_high, sampling.guidance_rescale)  # fmt: skip
    return Guidance(*map(np.float32, values))


@functools.partial(jax.jit, static_argnums=(1, 2))
def noise(keys: jax.Array, patches: int, patch_dim: int) -> jax.Array:
    """Normal [B, n, P], of every image's own key."""
    return jax.vmap(lambda key: jax.random.normal(key, (patches, patch_dim)))(keys)


@functools.partial(jax.jit, static_argnames="canvas")
def paint(
    params: dict,
    rows: Rows,
    x: jax.Array,
    keys: jax.Array,
    grid: Grid,
    guidance: Guidance,
    start: jax.Array,
    stop: jax.Array,
    canvas: Canvas,
) -> tuple[jax.Array, jax.Array]:
    """Steps start … stop of the grid: patches [B, n, P], and the clean ones that the model sees."""
    model = monoformer.bind(canvas.model, params)

    def draw(i):
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return noise(keys_now, canvas.patches, canvas.model.patch_dim)

    predict = predictor(model, rows, canvas, guidance)
    return solve(
        canvas.solver, predict, x, grid, draw=draw, clip=canvas.clip, start=start, stop=stop
    )


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
    c, n = config.model, branch_count(sampling, shown=False)
    canvas = make_canvas(config, sampling, (config.data.image_size,) * 2, n)
    shapes = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    placed = parameter_shardings(monoformer.parameter_axes(c), shapes, mesh)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed
    )

    def like(x, axis=0):
        where = NamedSharding(mesh, PartitionSpec(*[None] * axis, *BATCH))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    rows, slots = jax.eval_shape(lambda: no_rows(c, images * n)), bucket(prompt_tokens)
    cache = jax.eval_shape(lambda: KVCache.create(c, images * n, slots))
    cache = KVCache(like(cache.k, 1), like(cache.v, 1), cache.index)
    rows = rows.replace(cache=cache, lengths=like(rows.lengths), hidden=like(rows.hidden))
    x = like(jax.ShapeDtypeStruct((images, canvas.patches, c.patch_dim), np.float32))
    keys = like(jax.eval_shape(lambda: row_keys(0, images)))
    grid = make_grid(sampling.solver, sampling.steps, sampling.shift)
    ends = (np.int32(0), np.int32(sampling.steps))
    with jax.set_mesh(mesh):
        return paint.lower(params, rows, x, keys, grid, make_guidance(sampling), *ends, canvas)


def predictor(
    model: monoformer.MonoFormer, rows: Rows, canvas: Canvas, guidance: Guidance
) -> ddpm.Predictor:
    """The model as a function of patches [B, n, P] and t, after prefixes that have run already.

    Returns:
      (x, t) -> what the image head predicts, guided, and the variance numbers of the first branch.
    """
    inputs, mask = _image_block(rows, canvas)
    first, c = canvas.model.time_tokens, canvas.model
    cache = with_room(rows.cache, first + canvas.patches)

    def branches_of(x):
        return x.reshape(-1, canvas.branches, *x.shape[1:])

    def predict(x, t):
        # The cache is read and never kept: every evaluation writes the same slots anew.
        x = jnp.repeat(jnp.pad(x, ((0, 0), (first, 0), (0, 0))), canvas.branches, axis=0)
        times = jnp.full((x.shape[0], 1), t)
        hidden, _ = model(inputs | {"patches": x}, times, mask, cache)
        output = model.image_output(hidden, inputs["image_ids"], times)[:, first:]
        predicted, variance = monoformer.split_output(output, c)
        predicted = guide(branches_of(predicted), t, guidance, canvas.guided)
        return predicted, None if variance is None else branches_of(variance)[:, 0]

    return predict


def _image_block(rows: Rows, canvas: Canvas) -> tuple[dict[str, jax.Array], IntervalMask]:
    """Inputs and mask of the TIME and PATCH tokens that follow the rows."""
    c, batch, end = canvas.model, len(rows.lengths), rows.slots
    first, n = c.time_tokens, c.time_tokens + canvas.patches
    index = jnp.arange(n)
    sees_all = (index >= first) & c.bidirectional_images
    stop = jnp.broadcast_to(end + jnp.where(sees_all, n, index + 1), (batch, n))
    grid = jnp.stack(jnp.divmod(jnp.arange(canvas.patches), canvas.width), -1)
    inputs = {
        "tokens": jnp.zeros((batch, n), jnp.int32),  # not looked at where there is an image
        "kinds": jnp.broadcast_to(jnp.where(index < first, TIME, PATCH), (batch, n)),
        "positions": rows.lengths[:, None] + index,
        "image_ids": jnp.ones((batch, n), jnp.int32),
        "denoise": jnp.ones((batch, n), bool),
        "grid": jnp.broadcast_to(jnp.pad(grid, ((first, 0), (0, 0))), (batch, n, 2)),
        "features": jnp.zeros((batch, n, c.feature_dim)),
    }
    return inputs, IntervalMask(jnp.broadcast_to(rows.starts[:, None], (batch, n)), stop)
