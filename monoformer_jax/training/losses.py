"""Training losses: next-token cross-entropy, and the diffusion loss of denoised images."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from monoformer_jax.batch import PATCH, Batch
from monoformer_jax.config import Config
from monoformer_jax.diffusion.objectives import get_objective
from monoformer_jax.models import get_model
from monoformer_jax.nn import lora
from monoformer_jax.nn.conditioning import broadcast_to_tokens, image_one_hot
from monoformer_jax.training.text_loss import text_loss


@flax.struct.dataclass
class Noise:
    """Noise levels and noise of a batch, drawn before it is split into micro-batches."""

    times: jax.Array  # float32 [B, I]; 0 for conditioning images
    noise: jax.Array  # float32 [B, L, P]


@flax.struct.dataclass
class LossNormalizers:
    """Denominators of the losses, over the global batch."""

    text: jax.Array  # sum of the target weights
    images: jax.Array  # number of denoised images


def draw_latents(key: jax.Array, batch: Batch) -> Batch:
    """Samples latents from their mean and log-variance, if the batch has a log-variance."""
    if not batch["patch_logvar"].shape[-1]:
        return batch
    noise = jax.random.normal(key, batch["patches"].shape)
    drawn = batch["patches"] + jnp.exp(0.5 * batch["patch_logvar"]) * noise
    is_patch = (batch["token_types"] == PATCH)[..., None]
    return dict(batch) | {"patches": jnp.where(is_patch, drawn, 0.0)}


def draw_noise(time_key: jax.Array, noise_key: jax.Array, batch: Batch, config: Config) -> Noise:
    """Draws noise levels and noise for a batch, from one key each."""
    denoised = denoised_images(batch, config.max_images)
    c = config.objective
    objective = get_objective(c)
    times = objective.sample_times(time_key, denoised.shape, c)
    if c.noise_limit < 1:
        limited = objective.limit_times(times, c.noise_limit)
        times = jnp.where(continued_images(batch, config.max_images), limited, times)
    noise = jax.random.normal(noise_key, batch["patches"].shape)
    return Noise(jnp.where(denoised, times, 0.0), noise)


def denoised_images(batch: Batch, images: int) -> jax.Array:
    """Bool [B, I], which images of each row are denoised."""
    image_of = image_one_hot(batch["image_ids"], images, jnp.float32)
    return jnp.einsum("BL,BLI->BI", batch["denoise"], image_of) > 0


def continued_images(batch: Batch, images: int) -> jax.Array:
    """Bool [B, I], which images of each row more follows than <|im_end|> and </s>."""
    segments = batch["segment_ids"]
    index, length = jnp.arange(segments.shape[1]), segments.shape[1]
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    last = jax.lax.cummin(jnp.where(segments != after, index, length), axis=1, reverse=True)
    image_of = image_one_hot(batch["image_ids"], images, jnp.float32)
    near_the_end = jnp.einsum("BL,BLI->BI", last - index <= 2, image_of)
    return (near_the_end == 0) & (image_of.sum(1) > 0)


def loss_normalizers(batch: Batch, noise: Noise) -> LossNormalizers:
    # A batch without images or without text targets has loss 0, not NaN.
    images = jnp.sum(denoised_images(batch, noise.times.shape[1])).astype(jnp.float32)
    return LossNormalizers(
        jnp.maximum(batch["target_weights"].sum(), 1e-6), jnp.maximum(images, 1.0)
    )


def loss_fn(
    params: dict, batch: Batch, noise: Noise, normalizers: LossNormalizers, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a (micro-)batch; losses of micro-batches sum to that of the global batch.

    The image loss is averaged over the values of an image, then over images, so that images of all
    sizes have equal weight. The text loss is the mean cross-entropy weighted by target_weights.
    Auxiliary losses of the model (`Outputs.aux`) are already weighted.

    Args:
      params: parameters of the model, with adapters under "lora" if config.lora.rank > 0.
      batch: see `batch.FIELDS`.

    Returns:
      The weighted loss, and {"text_loss", "image_loss"} before weighting.
    """
    if config.lora.rank:
        params = {**params, "lora": lora.scaled(params["lora"], config.lora)}
    model, objective = get_model(config.model), get_objective(config.objective)
    image_of = image_one_hot(batch["image_ids"], noise.times.shape[1], jnp.float32)
    t = broadcast_to_tokens(noise.times[..., None], image_of)  # [B, L, 1]
    clean = batch["patches"]
    noised = objective.add_noise(clean, noise.noise, t)
    x_t = jnp.where(batch["denoise"][..., None], noised, clean)
    out = model.forward(config.model, params, batch, x_t, noise.times)

    text, head = jnp.zeros(()), model.text_head(config.model, params)
    if head is not None:
        vocab_size = config.layout.vocab_size
        text = text_loss(
            out.text_hidden, head, batch["targets"], batch["target_weights"], vocab_size,
            config.loss.z_loss,
        )  # fmt: skip
    text = text / normalizers.text

    error = objective.loss(out.prediction, out.variance, clean, noise.noise, t).mean(-1)
    denoised = (batch["denoise"] & (batch["token_types"] == PATCH)).astype(jnp.float32)
    patches = jnp.einsum("BL,BLI->BI", denoised, image_of)
    summed = jnp.einsum(
        "BL,BLI->BI", denoised * error, image_of, precision=jax.lax.Precision.HIGHEST
    )
    image = (summed / jnp.maximum(patches, 1.0)).sum() / normalizers.images

    loss = config.loss.text_weight * text + config.loss.image_weight * image
    return loss + sum(out.aux.values()), {"text_loss": text, "image_loss": image}
