"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598), within an interval of t."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(
    conditional: jax.Array,
    unconditional: jax.Array,
    t: jax.Array,
    scale: float | jax.Array,
    interval: tuple[float, float] = (0.0, 1.0),
    values: int | None = None,
) -> jax.Array:
    """unconditional + scale * (conditional - unconditional) where low <= t <= high.

    Outside the interval, and at scale 1, it is the conditional prediction. The interval is that of
    Kynkäänniemi et al. (arXiv 2404.07724) on the clock t of `rectified_flow`. With `values` only so
    many of the first entries of the last axis are guided, and the others are the conditional ones.
    """
    low, high = interval
    scale = jnp.where((low <= t) & (t <= high), scale, 1.0)
    guided = unconditional + scale * (conditional - unconditional)
    if values is None:
        return guided
    return jnp.concatenate([guided[..., :values], conditional[..., values:]], -1)
