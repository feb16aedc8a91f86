"""Losses on held-out rows: of text, and of images by noise level with fixed noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.batch import Batch, Document
from monoformer_jax.config import DataConfig
from monoformer_jax.data.held_out import HeldOut, open_held_out, stack_rows
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import batch_shards, local_rows, put_batch, use_mesh
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training.losses import (
    LossNormalizers,
    Noise,
    denoised_images,
    draw_latents,
    loss_fn,
)

# Noise levels t at which the image loss is measured: their mean follows the quality of the images, and
# unlike the training loss does not depend on the levels that were drawn (Esser et al., 2403.03206).
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def open_rows(sampler: Sampler, data: DataConfig, rows: int) -> HeldOut:
    """Opens the held-out examples of `data` for a model, see `open_held_out`."""
    config = sampler.config
    return open_held_out(
        data, config.layout, sampler.tokenizer, rows=rows, max_images=config.max_images,
        text_beside_images=config.loss.text_beside_images,
    )  # fmt: skip


class HeldOutLoss:
    """Text and image losses of a model on fixed rows with fixed noise; one program for all calls."""

    def __init__(self, sampler: Sampler, rows: Sequence[Document]):
        """Args:
        sampler: the model that will be measured; its weights are not read.
        rows: see `data.held_out.HeldOut`.
        """
        config, self._mesh = sampler.config, sampler.mesh
        # The cross-entropy alone, without the term that keeps logits small.
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, z_loss=0.0))
        size = config.batch_size // config.optimizer.grad_accum_steps
        if self._mesh is not None:
            size = max(size - size % batch_shards(self._mesh), batch_shards(self._mesh))
        self._loss, self._size = config.loss, size
        self._batches = stack_rows(rows, config.layout, size, sampler.tokenizer.pad_id)
        if self._mesh is not None:
            kept = local_rows(size, self._mesh)
            self._batches = [{k: x[kept] for k, x in batch.items()} for batch in self._batches]

        def sums(params, batch, first, level):
            with full_precision(config.model.dtype):
                return _sums(params, batch, first, level, config)

        self._sums = jax.jit(sums)

    def __call__(self, params: dict) -> dict[str, float]:
        """The mean losses, by name; those without a target in the rows are absent.

        text_loss: cross-entropy per token, nats. image_loss: mean over `LEVELS` of the loss of an
        image, and image_loss_tLEVEL. loss: both, weighted as in training. Every process must call it.
        """
        sums, found = [], np.zeros((len(LEVELS), 4))
        with use_mesh(self._mesh):
            for number, batch in enumerate(self._batches):
                batch = batch if self._mesh is None else put_batch(batch, self._mesh)
                first = np.uint32(number * self._size)
                sums.append([self._sums(params, batch, first, np.float32(t)) for t in LEVELS])
        for of_levels in jax.device_get(sums):
            found += np.asarray(of_levels, np.float64)
        text, tokens, image, images = found.T
        losses = {}
        if tokens.any():
            losses["text_loss"] = text.sum() / tokens.sum()
        if images.any():
            losses["image_loss"] = (image / images).mean()
        weights = {"text_loss": self._loss.text_weight, "image_loss": self._loss.image_weight}
        losses["loss"] = sum(weights[name] * value for name, value in losses.items())
        for level, one, many in zip(LEVELS, image, images):
            if many:
                losses[f"image_loss_t{level}"] = one / many
        return {name: float(value) for name, value in losses.items()}


def _sums(params: dict, batch: Batch, first: jax.Array, level: jax.Array, config) -> tuple:
    """Sums over a batch: text loss, target weights, image loss at this level, denoised images.

    The noise of row i depends on first + i alone, so the size of the batches changes nothing.
    """
    rows, *shape = batch["patches"].shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), first + jnp.arange(rows))
    latent_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    batch = jax.vmap(draw_latents)(latent_keys, batch)
    denoised = denoised_images(batch, config.max_images)
    values = jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys)
    noise, one = Noise(jnp.where(denoised, level, 0.0), values), jnp.ones(())
    _, parts = loss_fn(params, batch, noise, LossNormalizers(one, one), config)
    weights = batch["target_weights"].sum()
    return parts["text_loss"], weights, parts["image_loss"], denoised.sum()
