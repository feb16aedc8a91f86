"""Denoising diffusion (DDPM): the loss and the samplers of the released weights.

The timestep is one of `steps` integers k, 0 the least noisy; `step_to_t(k)` maps it to the library's
t in [0, 1]. With a_k the cumulative product of 1 - beta,

    x_k = sqrt(a_k) x + sqrt(1 - a_k) ε

the model predicts ε and, with learned sigma, an interpolation between the two bounds of the posterior
variance. Sources: Ho et al. (arXiv 2006.11239) for the process, Nichol & Dhariwal (arXiv 2102.09672)
for the learned variance, its loss and respacing, Song et al. (arXiv 2010.02502) for DDIM.

Every function is elementwise: all arrays have one shape, and `step` (int32) broadcasts against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.errors import require

STEPS = 1000  # timesteps in training; samplers may use a subset


def step_to_t(step: jax.Array | np.ndarray) -> jax.Array:
    """Timestep k of the full process -> t = k / 1000 in float32; the time embedding takes 1000 t.

    1000 t equals k except for ten k, where it is an adjacent float32. A table, because compilers
    divide by a constant less exactly.
    """
    return jnp.asarray(np.arange(STEPS, dtype=np.float32) / np.float32(STEPS))[step]


def t_to_step(t: jax.Array) -> jax.Array:
    """Inverse of `step_to_t`."""
    return jnp.rint(STEPS * t).astype(jnp.int32)


@flax.struct.dataclass
class Schedule:
    """Tables of a (respaced) diffusion process, float64 [steps]; lookups are float32.

    Attributes:
      timestep_map: int64, the timestep of the full process for each step of this one.
      fixed_log_variance: used without learned sigma: log beta, but at step 0 the clipped posterior
        log-variance, which has the better likelihood.
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
        """Tables padded to length STEPS with their last value, so that all have one shape."""
        return jax.tree.map(lambda x: np.pad(x, (0, STEPS - len(x)), mode="edge"), self)


def linear_betas(steps: int = STEPS) -> np.ndarray:
    """Linear from 1e-4 to 0.02 for 1000 steps, scaled so that other lengths end equally noisy."""
    return np.linspace(1e-4, 0.02, steps) * (STEPS / steps)


def cosine_betas(steps: int = STEPS) -> np.ndarray:
    """a_k = cos²((k / steps + 0.008) / 1.008 · π / 2), betas at most 0.999 (arXiv 2102.09672)."""
    products = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - products[1:] / products[:-1], 0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}  # objective.beta_schedule


def make_schedule(sections: int | str = STEPS, beta_schedule: str = "linear") -> Schedule:
    """The process of 1000 steps, or its subset that `spaced_steps` keeps.

    The betas of the subset are such that its a_k equal those of the full process at the kept steps.

    Args:
      sections: see `spaced_steps`.
      beta_schedule: a name in `BETAS`.
    """
    kept = np.array(spaced_steps(STEPS, sections))
    products = np.cumprod(1 - BETAS[beta_schedule]())[kept]
    betas = 1 - products / np.append(1.0, products[:-1])
    products = np.cumprod(1 - betas)
    before = np.append(1.0, products[:-1])
    variance = betas * (1 - before) / (1 - products)
    # The first variance is 0 and has no logarithm; the second replaces it.
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
    """The timesteps that a respaced process of fewer steps keeps, in ascending order.

    Args:
      total: steps of the full process.
      sections: "20" or 20 keeps 20 evenly spaced steps; "10,15,20" splits the process into three
        equal parts and keeps 10, 15 and 20 of them; "ddim25" keeps 25 at an integer stride from 0.

    Raises:
      InputError: `sections` has another form, or keeps more steps than there are.
    """
    text = str(sections)
    wrong = f"respacing {text!r} is not valid for a process of {total} steps"
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
        # Python rounds halves to even; the released samplers use exactly these timesteps.
        kept += [start + round(stride * j) for j in range(count)]
        start += size
    return kept


def _at(table: np.ndarray, step: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[step]


def q_sample(x: jax.Array, noise: jax.Array, step: jax.Array, schedule: Schedule) -> jax.Array:
    """x_k from clean x and noise ε."""
    signal = _at(np.sqrt(schedule.alphas_cumprod), step)
    return signal * x + _at(np.sqrt(1 - schedule.alphas_cumprod), step) * noise


@dataclasses.dataclass(frozen=True)
class ReverseGaussian:
    """The model's p(x_{k-1} | x_k): mean, log-variance, and the predicted clean image."""

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
    """p(x_{k-1} | x_k) from the model's predictions.

    Args:
      x: x_k.
      noise: predicted ε.
      variance: the model's variance output: -1 is the posterior's and 1 is beta, interpolated in
        log space; None (no learned sigma) selects `Schedule.fixed_log_variance`.
      clip: clip the predicted clean image to [-1, 1]; for pixels, since latents are not bounded.
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
    """The two elementwise terms of the hybrid loss, which is their sum.

    The second term, in bits, trains only the variance: the predicted mean gets no gradient from it.

    Returns:
      (predicted - noise)², and the term of the variational bound: KL(posterior || model), or at step
      0 the negative log-likelihood of x in 256 levels. It is 0 without `variance`.
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
    """KL(N1 || N2) of two Gaussians, in nats."""
    difference = log_variance1 - log_variance2
    apart = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (-1.0 - difference + jnp.exp(difference) + apart)


@jax.custom_jvp
def _tanh(x: jax.Array) -> jax.Array:
    """tanh that is accurate near -1 and 1, where XLA's float32 tanh is coarse.

    There the probability of a bin is a small difference, and the loss takes its logarithm.
    """
    small = jnp.exp(-2 * jnp.abs(x))
    return jnp.sign(x) * (1 - 2 * small / (1 + small))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = _tanh(*primals)
    return y, (1 - y * y) * tangents[0]


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-probability in nats of the bin of x under a Gaussian: 256 bins over [-1, 1], ends open."""

    def below(edge):  # Page's tanh approximation of the normal CDF
        z = jnp.exp(-log_scale) * (x - mean + edge)
        return 0.5 * (1 + _tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper, lower = below(1 / 255), below(-1 / 255)
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


# (x_k, t) -> predicted noise and the variance output (None without learned sigma).
Predictor = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


def ancestral_step(
    predict: Predictor,
    x: jax.Array,
    k: jax.Array,
    noise: jax.Array,
    schedule: Schedule,
    clip: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One DDPM step: samples x_{k-1} given x_k.

    Args:
      noise: standard normal, with the shape of x.

    Returns:
      x_{k-1}, and the clean image predicted from x_k.
    """
    predicted, variance = predict(x, step_to_t(jnp.asarray(schedule.timestep_map)[k]))
    p = p_mean_variance(x, predicted, variance, k, schedule, clip)
    return p.mean + jnp.where(k == 0, 0.0, jnp.exp(0.5 * p.log_variance)) * noise, p.clean


def ddim_step(
    predict: Predictor, x: jax.Array, k: jax.Array, schedule: Schedule, clip: bool = False
) -> tuple[jax.Array, jax.Array]:
    """One DDIM step, deterministic (eta = 0); returns the same as `ancestral_step`."""
    predicted, variance = predict(x, step_to_t(jnp.asarray(schedule.timestep_map)[k]))
    clean = p_mean_variance(x, predicted, variance, k, schedule, clip).clean
    # A clipped image implies a noise other than the predicted one.
    noise = _at(schedule.sqrt_recip_alphas_cumprod, k) * x - clean
    noise = noise / _at(schedule.sqrt_recipm1_alphas_cumprod, k)
    before = _at(schedule.alphas_cumprod_prev, k)
    return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * noise, clean
