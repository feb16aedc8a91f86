"""Samplers from noise to an image: Euler and Heun for rectified flow, ancestral DDPM and DDIM.

The noise levels are arrays of a fixed length, whatever the number of steps, and the loop bounds are
arrays too, so 1 step, 1000 steps and any range of steps run the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.rectified_flow import shift_times
from monoformer_jax.errors import require

MAX_STEPS = ddpm.STEPS


@flax.struct.dataclass
class TimeGrid:
    """The noise levels of a sampling run."""

    steps: jax.Array  # int32 []
    times: jax.Array  # float32 [MAX_STEPS + 1], from 1 to 0, padded with 0; for euler and heun
    schedule: ddpm.Schedule | None  # padded; for ddpm and ddim


# step number -> standard normal noise with the shape of x, for the stochastic solver.
Draw = Callable[[jax.Array], jax.Array]


def make_time_grid(
    solver: str, steps: int | str, shift: float = 1.0, beta_schedule: str = "linear"
) -> TimeGrid:
    """Builds the grid of a solver.

    Args:
      solver: a name in `SOLVERS`.
      steps: number of steps; for "ddpm" and "ddim" also a respacing, see `ddpm.spaced_steps`.
      shift: timestep shift of "euler" and "heun", see `shift_times`.
      beta_schedule: noise schedule of "ddpm" and "ddim", a name in `ddpm.BETAS`.

    Raises:
      InputError: an unknown solver, steps outside 1 … 1000, or an invalid respacing.
    """
    require(solver in SOLVERS, f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    require(shift > 0, f"shift={shift} must be above 0")
    if isinstance(steps, int):
        require(
            1 <= steps <= MAX_STEPS,
            f"steps={steps}: sampling takes 1 to {MAX_STEPS} steps",
        )
    if solver in ("ddpm", "ddim"):
        schedule = ddpm.make_schedule(steps, beta_schedule)
        times = np.zeros(MAX_STEPS + 1, np.float32)
        return TimeGrid(np.int32(len(schedule)), times, schedule.padded())
    times = shift_times(np.linspace(1.0, 0.0, int(steps) + 1), shift).astype(np.float32)
    return TimeGrid(np.int32(steps), np.pad(times, (0, MAX_STEPS - int(steps))), None)


def solve(
    solver: str,
    predict: ddpm.Predictor,
    x: jax.Array,
    grid: TimeGrid,
    *,
    draw: Draw | None = None,
    clip: bool = False,
    start: jax.Array | int = 0,
    stop: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the steps [start, stop) of the grid, by default all of them.

    Args:
      predict: (x, t) -> velocity, or noise and variance, see `ddpm.Predictor`.
      draw: only for "ddpm".
      clip: only for "ddpm" and "ddim": clip the predicted clean image to [-1, 1].

    Returns:
      x after the last step, and the clean image predicted in that step.
    """

    def body(i, carry):
        return SOLVERS[solver](predict, carry[0], jnp.asarray(i), grid, draw, clip)

    stop = grid.steps if stop is None else stop
    return jax.lax.fori_loop(start, stop, body, (x, jnp.zeros_like(x)))


def _times(grid: TimeGrid, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    times = jnp.asarray(grid.times)
    return times[i], times[i + 1]


def _euler(predict, x, i, grid, draw, clip):
    """First order: one evaluation per step."""
    t, t_next = _times(grid, i)
    v, _ = predict(x, t)
    return x + (t_next - t) * v, x - t * v


def _heun(predict, x, i, grid, draw, clip):
    """Second order: two evaluations per step; the last step is an Euler step."""
    t, t_next = _times(grid, i)
    v, _ = predict(x, t)
    ahead = x + (t_next - t) * v

    def correct(v):
        return x + (t_next - t) * (v + predict(ahead, t_next)[0]) / 2

    return jax.lax.cond(i == grid.steps - 1, lambda v: ahead, correct, v), x - t * v


def _ddpm(predict, x, i, grid, draw, clip):
    return ddpm.ancestral_step(predict, x, grid.steps - 1 - i, draw(i), grid.schedule, clip)


def _ddim(predict, x, i, grid, draw, clip):
    return ddpm.ddim_step(predict, x, grid.steps - 1 - i, grid.schedule, clip)


# Evaluations of the model per step, about.
EVALUATIONS = {"euler": 1, "heun": 2, "ddpm": 1, "ddim": 1}
SOLVERS = {"euler": _euler, "heun": _heun, "ddpm": _ddpm, "ddim": _ddim}
