"""The two losses of one forward pass: next token, and the noise in denoised images."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from monoformer_jax.batch import PATCH, Batch
from monoformer_jax.config import Config
from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.rectified_flow import interpolate, sample_times, velocity_target
from monoformer_jax.models import monoformer
from monoformer_jax.nn import lora
from monoformer_jax.nn.conditioning import broadcast_to_tokens, image_one_hot
from monoformer_jax.training.text_loss import text_loss


@flax.struct.dataclass
class Noise:
    """What is drawn for a batch, once, before it is cut into micro-batches."""

    times: jax.Array  # float32 [B, I]; 0 for context images
    noise: jax.Array  # float32 [B, L, P]


@flax.struct.dataclass
class LossNormalizers:
    """What the sums of the losses are divided by, over the global batch."""

    text: jax.Array  # sum of the target weights
    images: jax.Array  # number of denoised images


def draw_latents(key: jax.Array, batch: Batch) -> Batch:
    """The batch with its latents drawn from their mean and log-variance, where it has one."""
    if not batch["patch_logvar"].shape[-1]:
        return batch
    noise = jax.random.normal(key, batch["patches"].shape)
    drawn = batch["patches"] + jnp.exp(0.5 * batch["patch_logvar"]) * noise
    is_patch = (batch["token_types"] == PATCH)[..., None]
    return dict(batch) | {"patches": jnp.where(is_patch, drawn, 0.0)}


def draw_noise(key: jax.Array, batch: Batch, config: Config) -> Noise:
    time_key, noise_key = jax.random.split(key)
    denoised = _denoised(batch, config.max_images)
    if config.objective.kind == "ddpm":
        times = ddpm.step_to_t(jax.random.randint(time_key, denoised.shape, 0, ddpm.STEPS))
    else:
        times = sample_times(time_key, denoised.shape, config.objective)
    noise = jax.random.normal(noise_key, batch["patches"].shape)
    return Noise(jnp.where(denoised, times, 0.0), noise)


def _denoised(batch: Batch, images: int) -> jax.Array:
    """Bool [B, I], the images of each row that are noised."""
    image_of = image_one_hot(batch["image_ids"], images, jnp.float32)
    return jnp.einsum("BL,BLI->BI", batch["denoise"], image_of) > 0


def loss_normalizers(batch: Batch, noise: Noise) -> LossNormalizers:
    # An image-free or text-free batch has loss 0, not NaN.
    images = jnp.sum(_denoised(batch, noise.times.shape[1])).astype(jnp.float32)
    return LossNormalizers(
        jnp.maximum(batch["target_weights"].sum(), 1e-6), jnp.maximum(images, 1.0)
    )


def loss_fn(
    params: dict, batch: Batch, noise: Noise, normalizers: LossNormalizers, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a (micro-)batch, as its share of the global batch's: micro-batches add up.

    The image loss is the mean over the values of an image, then the mean over images, so that a
    large image counts as much as a small one: squared error of the velocity, or DDPM's hybrid loss.
    The text loss is the mean cross-entropy weighted by target_weights.

    Args:
      params: nested dict of `monoformer.init`, with adapters under "lora" where config.lora has some.
      batch: see `batch.spec`.

    Returns:
      The weighted loss, and {"text_loss", "image_loss"} before weighting.
    """
    adapters = None
    if config.lora.rank:
        params = dict(params)
        adapters = lora.scaled(params.pop("lora"), config.lora)
    model = monoformer.bind(config.model, params)
    image_of = image_one_hot(batch["image_ids"], noise.times.shape[1], jnp.float32)
    t = broadcast_to_tokens(noise.times[..., None], image_of)  # [B, L, 1]
    inputs = dict(batch) | {"patches": _noised(batch, noise.noise, t, config)}
    mask = monoformer.attention_mask(config.model, batch)
    hidden, _ = model(inputs, noise.times, mask, adapters=adapters)

    head, vocab_size = model.text_head[...], config.model.vocab_size
    text = text_loss(hidden, head, batch["targets"], batch["target_weights"], vocab_size)
    text = text / normalizers.text

    output = model.image_output(hidden, batch["image_ids"], noise.times)
    error = _error(output, batch["patches"], noise.noise, t, config).mean(-1)
    painted = (batch["denoise"] & (batch["token_types"] == PATCH)).astype(jnp.float32)
    patches = jnp.einsum("BL,BLI->BI", painted, image_of)
    per_image = jnp.einsum("BL,BLI->BI", painted * error, image_of) / jnp.maximum(patches, 1.0)
    image = per_image.sum() / normalizers.images

    loss = config.loss.text_weight * text + config.loss.image_weight * image
    return loss, {"text_loss": text, "image_loss": image}


def _noised(batch: Batch, noise: jax.Array, t: jax.Array, config: Config) -> jax.Array:
    """Patches [B, L, P] as the model sees them; those of context images are clean."""
    if config.objective.kind == "rectified_flow":
        return interpolate(batch["patches"], noise, t)
    noised = ddpm.q_sample(batch["patches"], noise, ddpm.t_to_step(t), ddpm.make_schedule())
    return jnp.where(batch["denoise"][..., None], noised, batch["patches"])


def _error(output, clean, noise, t, config: Config) -> jax.Array:
    """Loss [B, L, P] of every patch value, whether it is noised or not."""
    predicted, variance = monoformer.split_output(output, config.model)
    if config.objective.kind == "rectified_flow":
        return jnp.square(predicted - velocity_target(clean, noise))
    step, schedule = ddpm.t_to_step(t), ddpm.make_schedule()
    squared, bound = ddpm.hybrid_loss_terms(clean, noise, predicted, variance, step, schedule)
    return squared + bound
