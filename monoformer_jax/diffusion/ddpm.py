"""Denoising diffusion (DDPM): the objective and the samplers that the released weights know.

The noise level is one of `steps` integers k, 0 the least noisy; `clock(k)` is where it stands on the
library's t in [0, 1]. With a_k the running product of 1 - beta,

    x_k = sqrt(a_k) x + sqrt(1 - a_k) ε

the model predicts ε and, with learned sigma, how its variance lies between the two bounds of the
posterior. Sources: Ho et al. (arXiv 2006.11239) for the chain, Nichol & Dhariwal (arXiv 2102.09672)
for the learned variance, its loss and respacing, Song et al. (arXiv 2010.02502) for DDIM.

Every function is elementwise: arrays of any one shape, with steps int32 that broadcasts against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.errors import require

STEPS = 1000  # of the chain that is trained; samplers walk a part of it


def step_to_t(step: jax.Array | np.ndarray) -> jax.Array:
    """Step k of the whole chain -> t = k / 1000 in float32, which the time embedding multiplies back.

    1000 t is k again for all but ten k, and there the next float32. It is a table because compilers
    divide by a constant less exactly.
    """
    return jnp.asarray(np.arange(STEPS, dtype=np.float32) / np.float32(STEPS))[step]


def t_to_step(t: jax.Array) -> jax.Array:
    """The step that `clock` put at t."""
    return jnp.rint(STEPS * t).astype(jnp.int32)


@flax.struct.dataclass
class Schedule:
    """Tables of a chain, float64 [steps]; they are looked up as float32.

    Attributes:
      timestep_map: int64, the step of the whole chain that each step of this one stands for.
      fixed_log_variance: where the model does not learn it: of beta, but of the posterior at step
        0, where that is the better code.
    """

    timestep_map: np.ndarray
    betas: np.ndarray
    log_betas: np.ndarray
    fixed_log_variance: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    def padded(self) -> Schedule:
        """Tables of length STEPS, the last value repeated, so that every chain has one shape."""
        return jax.tree.map(lambda x: np.pad(x, (0, STEPS - len(x)), mode="edge"), self)


def linear_betas(steps: int = STEPS) -> np.ndarray:
    """From 1e-4 to 0.02 at 1000 steps, scaled so that other lengths end as noisy."""
    return np.linspace(1e-4, 0.02, steps) * (STEPS / steps)


def make_schedule(sections: int | str = STEPS) -> Schedule:
    """The chain of 1000 linear betas, or the part of it that `spaced_steps` keeps.

    The betas of the part are such that its a_k equal those of the whole at the kept steps.
    """
    kept = np.array(spaced_steps(STEPS, sections))
    products = np.cumprod(1 - linear_betas())[kept]
    betas = 1 - products / np.append(1.0, products[:-1])
    products = np.cumprod(1 - betas)
    before = np.append(1.0, products[:-1])
    variance = betas * (1 - before) / (1 - products)
    # The first variance is 0 and has no logarithm; the second stands in for it.
    clipped = np.append(variance[1], variance[1:]) if len(variance) > 1 else betas
    clipped = np.log(np.maximum(clipped, 1e-20))
    return Schedule(
        timestep_map=kept,
        betas=betas,
        log_betas=np.log(betas),
        fixed_log_variance=np.append(clipped[0], np.log(betas[1:])),
        alphas_cumprod=products,
        alphas_cumprod_prev=before,
        sqrt_recip_alphas_cumprod=np.sqrt(1 / products),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / products - 1),
        posterior_variance=variance,
        posterior_log_variance_clipped=clipped,
        posterior_mean_coef1=betas * np.sqrt(before) / (1 - products),
        posterior_mean_coef2=(1 - before) * np.sqrt(1 - betas) / (1 - products),
    )


def spaced_steps(total: int, sections: int | str) -> list[int]:
    """Which steps of a chain of `total` a shorter one keeps, in rising order.

    Args:
      total: steps of the whole chain.
      sections: "20" or 20 keeps 20 evenly spaced steps; "10,15,20" cuts the chain into three equal
        parts and keeps 10, 15 and 20 of them; "ddim25" keeps 25 at a whole stride from 0 on.

    Raises:
      InputError: it is none of these, or keeps more steps than there are.
    """
    text = str(sections)
    wrong = f"respacing {text!r} does not divide a chain of {total} steps"
    if text.startswith("ddim"):
        require(text[4:].isdecimal() and int(text[4:]) > 0, wrong)
        strides = [s for s in range(1, total) if len(range(0, total, s)) == int(text[4:])]
        require(bool(strides), wrong)
        return list(range(0, total, strides[0]))
    counts = text.split(",")
    require(all(count.isdecimal() and int(count) > 0 for count in counts), wrong)
    start, kept = 0, []
    for i, count in enumerate(map(int, counts)):
        size = total // len(counts) + (i < total % len(counts))
        require(count <= size, wrong)
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Python rounds halves to even, and the released samplers walk exactly these steps.
        kept += [start + round(stride * j) for j in range(count)]
        start += size
    return kept


def _at(table: np.ndarray, step: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[step]


def q_sample(x: jax.Array, noise: jax.Array, step: jax.Array, schedule: Schedule) -> jax.Array:
    """x_k of clean x and noise ε."""
    signal = _at(np.sqrt(schedule.alphas_cumprod), step)
    return signal * x + _at(np.sqrt(1 - schedule.alphas_cumprod), step) * noise


@dataclasses.dataclass(frozen=True)
class ReverseGaussian:
    """The model's Gaussian for the step before: mean and log-variance, and the clean image it sees."""

    mean: jax.Array
    log_variance: jax.Array
    clean: jax.Array


def p_mean_variance(
    x: jax.Array,
    noise: jax.Array,
    variance: jax.Array | None,
    step: jax.Array,
    schedule: Schedule,
    clip: bool = False,
) -> ReverseGaussian:
    """p(x_{k-1} | x_k) from the predictions.

    Args:
      x: x_k.
      noise: predicted ε.
      variance: the model's number for the variance, -1 the posterior's and 1 beta, between them
        geometrically; None (no learned sigma) takes beta.
      clip: keep the predicted clean image in [-1, 1]; for pixels, since latents are not bounded.
    """
    clean = _at(schedule.sqrt_recip_alphas_cumprod, step) * x
    clean = clean - _at(schedule.sqrt_recipm1_alphas_cumprod, step) * noise
    if clip:
        clean = jnp.clip(clean, -1.0, 1.0)
    if variance is None:
        log_variance = _at(schedule.fixed_log_variance, step)
    else:
        share = (variance + 1) / 2
        log_variance = share * _at(schedule.log_betas, step)
        log_variance += (1 - share) * _at(schedule.posterior_log_variance_clipped, step)
    mean = _posterior_mean(clean, x, step, schedule)
    return ReverseGaussian(mean, jnp.broadcast_to(log_variance, mean.shape), clean)


def _posterior_mean(clean, x, step, schedule: Schedule) -> jax.Array:
    """Mean of q(x_{k-1} | x_k, x)."""
    first = _at(schedule.posterior_mean_coef1, step) * clean
    return first + _at(schedule.posterior_mean_coef2, step) * x


def hybrid_loss_terms(
    x: jax.Array,
    noise: jax.Array,
    predicted: jax.Array,
    variance: jax.Array | None,
    step: jax.Array,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """The two terms of the hybrid loss, elementwise; their sum is what is trained.

    The second term, in bits, teaches the variance alone: the predicted mean is held fixed in it.

    Returns:
      (predicted - noise)², and the variational bound's term: the divergence of the model's Gaussian
      from the posterior, or at step 0 the code length of x in 256 levels. It is 0 without `variance`.
    """
    squared = jnp.square(predicted - noise)
    if variance is None:
        return squared, jnp.zeros_like(squared)
    x_k = q_sample(x, noise, step, schedule)
    model = p_mean_variance(x_k, jax.lax.stop_gradient(predicted), variance, step, schedule)
    true_mean = _posterior_mean(x, x_k, step, schedule)
    true_log_variance = _at(schedule.posterior_log_variance_clipped, step)
    divergence = normal_kl(true_mean, true_log_variance, model.mean, model.log_variance)
    code_length = -discretized_log_likelihood(x, model.mean, 0.5 * model.log_variance)
    return squared, jnp.where(step == 0, code_length, divergence) / np.log(2.0)


def normal_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL divergence of Gaussian 2 from Gaussian 1, in nats."""
    difference = log_variance1 - log_variance2
    apart = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (-1.0 - difference + jnp.exp(difference) + apart)


@jax.custom_jvp
def _tanh(x: jax.Array) -> jax.Array:
    """Rounded well near -1 and 1, where XLA's own float32 tanh is coarse: a bin's mass is a small
    difference there, and the loss divides by it."""
    small = jnp.exp(-2 * jnp.abs(x))
    return jnp.sign(x) * (1 - 2 * small / (1 + small))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = _tanh(*primals)
    return y, (1 - y * y) * tangents[0]


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log of a Gaussian's mass, in nats, in the bin of x among 256 over [-1, 1]; the end bins are
    open."""

    def below(edge):  # Page's tanh approximation of the normal distribution function
        z = jnp.exp(-log_scale) * (x - mean + edge)
        return 0.5 * (1 + _tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper, lower = below(1 / 255), below(-1 / 255)
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


# (x_k, the clock t) -> predicted noise and the variance number (None without learned sigma).
Predictor = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


def ancestral_step(
    predict: Predictor,
    x: jax.Array,
    k: jax.Array,
    noise: jax.Array,
    schedule: Schedule,
    clip: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One step of the chain, from x_k to a draw of x_{k-1}.

    Args:
      noise: normal, like x.

    Returns:
      x_{k-1}, and the clean image that the model sees in x_k.
    """
    predicted, variance = predict(x, step_to_t(jnp.asarray(schedule.timestep_map)[k]))
    p = p_mean_variance(x, predicted, variance, k, schedule, clip)
    return p.mean + jnp.where(k == 0, 0.0, jnp.exp(0.5 * p.log_variance)) * noise, p.clean


def ddim_step(
    predict: Predictor, x: jax.Array, k: jax.Array, schedule: Schedule, clip: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same without drawing anything (eta = 0)."""
    predicted, variance = predict(x, step_to_t(jnp.asarray(schedule.timestep_map)[k]))
    clean = p_mean_variance(x, predicted, variance, k, schedule, clip).clean
    # A clipped image implies another noise than the one that was predicted.
    noise = _at(schedule.sqrt_recip_alphas_cumprod, k) * x - clean
    noise = noise / _at(schedule.sqrt_recipm1_alphas_cumprod, k)
    before = _at(schedule.alphas_cumprod_prev, k)
    return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * noise, clean
