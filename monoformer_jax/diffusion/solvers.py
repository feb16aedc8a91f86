"""Integrates dx/dt = v(x, t) from t = 1 (noise) down to t = 0 (data)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from monoformer_jax.diffusion.rectified_flow import shift_times

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def time_grid(steps: int, shift: float) -> jax.Array:
    """steps + 1 times from 1 to 0, float32."""
    return shift_times(jnp.linspace(1.0, 0.0, steps + 1), shift)


def euler(velocity: Velocity, x: jax.Array, times: jax.Array) -> jax.Array:
    """First order: one evaluation a step."""

    def step(x, ends):
        t, t_next = ends
        return x + (t_next - t) * velocity(x, t), None

    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def heun(velocity: Velocity, x: jax.Array, times: jax.Array) -> jax.Array:
    """Second order: two evaluations a step, and one in the last, which ends where v is smoothest."""

    def step(x, ends):
        t, t_next = ends
        v = velocity(x, t)
        v_next = velocity(x + (t_next - t) * v, t_next)
        return x + (t_next - t) * (v + v_next) / 2, None

    x = jax.lax.scan(step, x, (times[:-2], times[1:-1]))[0]
    return euler(velocity, x, times[-2:])


SOLVERS = {"euler": euler, "heun": heun}
