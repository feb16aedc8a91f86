"""Rectified flow against closed forms: sign of v, end points, orders of the solvers, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monoformer_jax.config import ObjectiveConfig
from monoformer_jax.diffusion.guidance import guide
from monoformer_jax.diffusion.rectified_flow import (
    interpolate,
    sample_times,
    shift_times,
    velocity_target,
)
from monoformer_jax.diffusion.solvers import SOLVERS, euler, time_grid

X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
NOISE = jnp.array([[-1.0, 0.25], [2.0, 1.0]])


def test_path_ends_at_data_and_noise_and_v_is_its_derivative():
    np.testing.assert_array_equal(interpolate(X, NOISE, jnp.float32(0)), X)
    np.testing.assert_array_equal(interpolate(X, NOISE, jnp.float32(1)), NOISE)
    _, derivative = jax.jvp(lambda t: interpolate(X, NOISE, t), (0.3,), (1.0,))
    np.testing.assert_allclose(velocity_target(X, NOISE), derivative, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_true_velocity_leads_from_noise_to_data_in_any_number_of_steps(solver, shift):
    for steps in (1, 2, 7):
        got = SOLVERS[solver](
            lambda x, t: velocity_target(X, NOISE), NOISE, time_grid(steps, shift)
        )
        np.testing.assert_allclose(got, X, atol=1e-5)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver, order):
    """dx/dt = x cos(2t): halving the step divides the error by 2^order."""
    exact = np.exp((np.sin(0.0) - np.sin(2.0)) / 2)
    solve = SOLVERS[solver]
    error = [
        abs(
            float(solve(lambda x, t: x * jnp.cos(2 * t), jnp.float32(1), time_grid(n, 1.0))) - exact
        )
        for n in (16, 32)
    ]
    assert error[0] / error[1] == pytest.approx(2**order, rel=0.15)


def test_flow_of_a_gaussian_ends_in_that_gaussian():
    """For data N(m, s²) the exact velocity is linear in x; its flow maps noise quantiles to data."""
    m, s = 2.0, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        centred = x - (1 - t) * m
        x0 = m + (1 - t) * s**2 / variance * centred
        return t / variance * centred - x0

    z = jnp.linspace(-2, 2, 9)
    got = euler(velocity, z, time_grid(500, 1.0))
    np.testing.assert_allclose(got, m + s * z, atol=2e-2)


def test_times_follow_their_distribution():
    key = jax.random.key(0)
    logit = jax.scipy.special.logit
    t = sample_times(key, (50_000,), ObjectiveConfig("logit_normal", -0.5, 0.8))
    assert float(logit(t).mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(logit(t).std()) == pytest.approx(0.8, abs=0.02)
    t = sample_times(key, (50_000,), ObjectiveConfig("uniform"))
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    shifted = sample_times(key, (50_000,), ObjectiveConfig("uniform", shift=3.0))
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), rtol=1e-5)


def test_shift_keeps_the_ends():
    np.testing.assert_allclose(shift_times(jnp.array([0.0, 0.5, 1.0]), 3.0), [0.0, 0.75, 1.0])


def test_guidance_by_hand():
    conditional, unconditional = jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0])
    inside = guide(conditional, unconditional, jnp.float32(0.5), 3.0, (0.2, 0.8))
    np.testing.assert_allclose(inside, [4.0, 10.0])
    outside = guide(conditional, unconditional, jnp.float32(0.9), 3.0, (0.2, 0.8))
    np.testing.assert_allclose(outside, conditional)
    np.testing.assert_allclose(
        guide(conditional, unconditional, jnp.float32(0.1), 1.0), conditional
    )
