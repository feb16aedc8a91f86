"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598), on all channels, within an interval."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(
    conditional: jax.Array,
    unconditional: jax.Array,
    t: jax.Array,
    scale: float | jax.Array,
    interval: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """unconditional + scale * (conditional - unconditional) where low <= t <= high.

    Outside the interval, and at scale 1, it is the conditional prediction. The interval is that of
    Kynkäänniemi et al. (arXiv 2404.07724) on the clock t of `rectified_flow`.
    """
    low, high = interval
    scale = jnp.where((low <= t) & (t <= high), scale, 1.0)
    return unconditional + scale * (conditional - unconditional)
