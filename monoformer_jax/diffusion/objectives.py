"""Diffusion objectives of the image head: `OBJECTIVES` maps `objective.kind` to one.

An objective samples noise levels, adds noise, and computes the loss. Arrays are [B, L, P], noise levels
t [B, L, 1] in the time convention of `rectified_flow` (t = 0 is data).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from monoformer_jax.config import ObjectiveConfig, one_of
from monoformer_jax.diffusion import ddpm, rectified_flow
from monoformer_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Objective:
    """A diffusion objective.

    Attributes:
      sample_times: (key, shape, ObjectiveConfig) -> float32 noise levels of that shape.
      limit_times: (t, most) -> the noise levels scaled to at most `most`.
      add_noise: (clean, noise, t) -> the noised image.
      loss: (prediction, variance or None, clean, noise, t) -> loss per value.
      solvers: names in `solvers.SOLVERS` that can sample it.
    """

    sample_times: Callable[[jax.Array, tuple[int, ...], ObjectiveConfig], jax.Array]
    limit_times: Callable[[jax.Array, float], jax.Array]
    add_noise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    loss: Callable[..., jax.Array]
    solvers: tuple[str, ...]


def _velocity_loss(prediction, variance, clean, noise, t):
    return jnp.square(prediction - rectified_flow.velocity_target(clean, noise))


def _ddpm_times(key, shape, c):
    return ddpm.step_to_t(jax.random.randint(key, shape, 0, ddpm.STEPS))


def _limit_ddpm_times(t, most):
    return ddpm.step_to_t(jnp.floor(ddpm.t_to_step(t) * most).astype(jnp.int32))


@functools.cache
def _ddpm(beta_schedule: str) -> Objective:
    schedule = ddpm.make_schedule(beta_schedule=beta_schedule)

    def add_noise(clean, noise, t):
        return ddpm.q_sample(clean, noise, ddpm.t_to_step(t), schedule)

    def hybrid_loss(prediction, variance, clean, noise, t):
        step = ddpm.t_to_step(t)
        return sum(ddpm.hybrid_loss_terms(clean, noise, prediction, variance, step, schedule))

    return Objective(_ddpm_times, _limit_ddpm_times, add_noise, hybrid_loss, ("ddpm", "ddim"))


OBJECTIVES = {
    "rectified_flow": Objective(
        rectified_flow.sample_times,
        jnp.multiply,
        rectified_flow.interpolate,
        _velocity_loss,
        ("euler", "heun"),
    ),
    "ddpm": _ddpm("linear"),
}


def get_objective(c: ObjectiveConfig) -> Objective:
    """Returns the objective of a config.

    Raises:
      InputError: the kind is unknown, or the noise schedule, or only "ddpm" has it.
    """
    require(c.kind in OBJECTIVES, f"objective.kind={c.kind!r} is none of {', '.join(OBJECTIVES)}")
    one_of("objective.beta_schedule", c.beta_schedule, ddpm.BETAS)
    if c.kind == "ddpm":
        return _ddpm(c.beta_schedule)
    require(
        c.beta_schedule == "linear",
        f"objective.beta_schedule={c.beta_schedule!r} is for objective.kind='ddpm'",
    )
    return OBJECTIVES[c.kind]


def check_solver(c: ObjectiveConfig, solver: str) -> None:
    """Raises InputError if the solver cannot sample the objective."""
    solvers = get_objective(c).solvers
    require(
        solver in solvers,
        f"sampling.solver={solver!r} does not sample objective.kind={c.kind!r}; "
        f"{' and '.join(solvers)} do",
    )
