"""Rectified flow: the straight path between an image and noise, and how its time is drawn.

Stated once for the whole library: t = 0 is data and t = 1 is noise,

    x_t = (1 - t) x + t ε        v = dx_t/dt = ε - x        x = x_t - t v

so sampling integrates v from t = 1 down to t = 0. Sources: Liu et al. (arXiv 2209.03003) for the path,
Esser et al. (arXiv 2403.03206) for logit-normal times and the resolution shift.
"""

from __future__ import annotations

import jax

from monoformer_jax.config import ObjectiveConfig


def sample_times(key: jax.Array, shape: tuple[int, ...], c: ObjectiveConfig) -> jax.Array:
    """Noise levels in (0, 1), float32 [*shape]."""
    if c.t_sampler == "uniform":
        t = jax.random.uniform(key, shape)
    else:
        t = jax.nn.sigmoid(c.logit_mean + c.logit_std * jax.random.normal(key, shape))
    return shift_times(t, c.shift)


def shift_times(t: jax.Array, shift: float) -> jax.Array:
    """t' = a t / (1 + (a - 1) t): a > 1 spends more of the path near noise; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def interpolate(x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t, with t broadcast over the trailing axes of x."""
    return (1 - t) * x + t * noise


def velocity_target(x: jax.Array, noise: jax.Array) -> jax.Array:
    """v = ε - x, whatever t is."""
    return noise - x
