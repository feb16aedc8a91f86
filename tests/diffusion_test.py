"""Rectified flow against closed forms: sign of v, endpoints, solver orders; guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monoformer_jax.config import ObjectiveConfig
from monoformer_jax.diffusion.guidance import Guidance, classifier_free_guidance
from monoformer_jax.diffusion.rectified_flow import (
    interpolate,
    sample_times,
    shift_times,
    velocity_target,
)
from monoformer_jax.diffusion.solvers import make_time_grid, solve
from monoformer_jax.errors import InputError

X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
NOISE = jnp.array([[-1.0, 0.25], [2.0, 1.0]])


def test_path_endpoints_and_velocity_target():
    np.testing.assert_array_equal(interpolate(X, NOISE, jnp.float32(0)), X)
    np.testing.assert_array_equal(interpolate(X, NOISE, jnp.float32(1)), NOISE)
    _, derivative = jax.jvp(lambda t: interpolate(X, NOISE, t), (0.3,), (1.0,))
    np.testing.assert_allclose(velocity_target(X, NOISE), derivative, rtol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_velocity_recovers_the_data_in_any_number_of_steps(solver, shift):
    compiled = jax.jit(
        lambda grid: solve(solver, lambda x, t: (velocity_target(X, NOISE), None), NOISE, grid)
    )
    for steps in (1, 2, 7, 1000):
        got, seen = compiled(make_time_grid(solver, steps, shift))
        np.testing.assert_allclose(got, X, atol=1e-4)
        np.testing.assert_allclose(seen, X, atol=1e-4)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver, order):
    """dx/dt = x cos(2t): halving the step divides the error by 2^order."""
    exact = np.exp((np.sin(0.0) - np.sin(2.0)) / 2)

    def end(steps):
        grid = make_time_grid(solver, steps)
        return solve(solver, lambda x, t: (x * jnp.cos(2 * t), None), jnp.float32(1), grid)[0]

    error = [abs(float(end(steps)) - exact) for steps in (16, 32)]
    assert error[0] / error[1] == pytest.approx(2**order, rel=0.15)


def test_flow_of_a_gaussian_ends_in_that_gaussian():
    """For data N(m, s²) the exact velocity is linear in x; its flow maps noise quantiles to data."""
    m, s = 2.0, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        centred = x - (1 - t) * m
        x0 = m + (1 - t) * s**2 / variance * centred
        return t / variance * centred - x0, None

    z = jnp.linspace(-2, 2, 9)
    got, _ = solve("euler", velocity, z, make_time_grid("euler", 500))
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


def test_shift_keeps_the_endpoints():
    np.testing.assert_allclose(shift_times(jnp.array([0.0, 0.5, 1.0]), 3.0), [0.0, 0.75, 1.0])


@pytest.mark.parametrize("solver", ["euler", "heun", "ddpm", "ddim"])
def test_solving_in_parts_equals_solving_at_once(solver):
    def predict(x, t):
        return x * jnp.cos(3 * t), jnp.zeros_like(x)

    grid = make_time_grid(solver, 7)
    draw = lambda i: jax.random.normal(jax.random.key(i), X.shape)  # noqa: E731
    walk = jax.jit(
        lambda x, start, stop: solve(solver, predict, x, grid, draw=draw, start=start, stop=stop)
    )
    whole, seen = walk(NOISE, 0, 7)
    x = NOISE
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        x, clean = walk(x, start, stop)
    np.testing.assert_array_equal(x, whole)
    np.testing.assert_array_equal(clean, seen)
    assert walk._cache_size() == 1


def test_invalid_steps_and_solvers_raise():
    with pytest.raises(InputError, match="solver 'rk4' is not one of euler, heun, ddpm"):
        make_time_grid("rk4", 4)
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"steps={steps}: sampling takes 1 to 1000 steps"):
            make_time_grid("euler", steps)


def branches(*values):
    return jnp.asarray(values, jnp.float32).reshape(1, len(values), 1, -1)


def test_guidance_by_hand():
    everything, less, nothing = [2.0, 4.0], [1.0, 1.0], [0.5, -1.0]
    two, t = branches(everything, less), jnp.float32(0.5)
    np.testing.assert_allclose(
        classifier_free_guidance(two, t, Guidance(3.0, low=0.2, high=0.8)), [[[4.0, 10.0]]]
    )
    np.testing.assert_allclose(
        classifier_free_guidance(two, t, Guidance(3.0, low=0.6)), [[everything]]
    )
    np.testing.assert_allclose(classifier_free_guidance(two, t, Guidance(1.0)), [[everything]])
    np.testing.assert_allclose(
        classifier_free_guidance(two, t, Guidance(3.0), values=1), [[[4.0, 4.0]]]
    )
    np.testing.assert_allclose(
        classifier_free_guidance(branches(everything), t, Guidance(3.0)), [[everything]]
    )
    three = branches(everything, less, nothing)
    # 0.5 + 1.5 (1 - 0.5) + 3 (2 - 1), and -1 + 1.5 (1 + 1) + 3 (4 - 1)
    got = classifier_free_guidance(three, t, Guidance(3.0, 1.5))
    np.testing.assert_allclose(got, [[[4.25, 11.0]]], rtol=1e-6)


def test_rescaled_guidance_has_the_std_of_the_conditional_prediction():
    two, t = branches([2.0, 4.0, -1.0], [1.0, 1.0, 1.0]), jnp.float32(0.5)
    plain, whole, half = (
        classifier_free_guidance(two, t, Guidance(5.0, rescale=r)) for r in (0.0, 1.0, 0.5)
    )
    np.testing.assert_allclose(whole.std(), two[0, 0].std(), rtol=1e-6)
    np.testing.assert_allclose(whole / plain, (whole / plain)[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=1e-6)
