"""DDPM: loss gradients and samplers against closed forms; parity_vision_test compares values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE

from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.solvers import make_time_grid, solve
from monoformer_jax.errors import InputError

RECORDED = np.load(REFERENCE / "diffusion" / "io.npz")


def loss_case():
    """Recorded arrays channels-last, so that ε and the variance are halves of the last axis."""
    x, noise, output, x_t = (
        np.moveaxis(RECORDED[f"loss/{key}"], 1, -1)
        for key in ("x_start", "noise", "model_output", "x_t")
    )
    predicted, variance = np.split(output, 2, axis=-1)
    return x, noise, predicted, variance, RECORDED["loss/t"][:, None, None, None], x_t


def test_the_divergence_is_that_of_the_first_from_the_second():
    """KL(N1 || N2) by quadrature; the other direction is 1.3 instead of 0.44."""
    x = np.linspace(-12, 12, 10_001)
    one, two = (np.exp(-((x - m) ** 2) / 2 / s**2) / s for m, s in ((0, 1), (1, 2)))
    want = np.trapezoid(one * np.log(one / two), x) / np.sqrt(2 * np.pi)
    got = ddpm.normal_kl(*map(jnp.float32, (0.0, 0.0, 1.0, np.log(4.0))))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_variational_bound_trains_only_the_variance():
    x, noise, predicted, variance, step, *_ = loss_case()
    schedule = ddpm.make_schedule()

    def bound(predicted, variance):
        return ddpm.hybrid_loss_terms(x, noise, predicted, variance, step, schedule)[1].sum()

    to_mean, to_variance = jax.grad(bound, (0, 1))(jnp.asarray(predicted), jnp.asarray(variance))
    assert (to_mean == 0).all()
    assert jnp.isfinite(to_variance).all() and (to_variance != 0).any(axis=(1, 2, 3)).all()


def test_t_to_step_inverts_step_to_t():
    steps = np.arange(ddpm.STEPS)
    again = np.asarray(1000.0 * ddpm.step_to_t(steps))
    assert (again != steps).sum() <= 10
    np.testing.assert_allclose(again, steps, rtol=1.2e-7)
    np.testing.assert_array_equal(ddpm.t_to_step(ddpm.step_to_t(steps)), steps)


@pytest.mark.parametrize("sections", ["0", "1001", "ten", "ddim0", "ddim999", "ddim", "10,900,1"])
def test_invalid_respacing_raises(sections):
    with pytest.raises(
        InputError, match=f"respacing '{sections}' is not valid for a process of 1000"
    ):
        ddpm.make_schedule(sections)


@pytest.mark.parametrize("learned, betas", [(True, "linear"), (False, "linear"), (False, "cosine")])
def test_samplers_recover_a_known_image(learned, betas):
    """With the exact ε of every x_k, each sampler ends at the image, whatever noise is sampled."""
    image = jnp.linspace(-0.9, 0.9, 8)
    whole = ddpm.make_schedule(beta_schedule=betas)
    products = jnp.asarray(whole.alphas_cumprod, jnp.float32)

    def predict(x, t):
        a = products[jnp.rint(1000 * t).astype(int)]
        return (x - jnp.sqrt(a) * image) / jnp.sqrt(1 - a), jnp.zeros(8) if learned else None

    def draw(i):
        return jax.random.normal(jax.random.key(i), (8,))

    noise = draw(0)
    for sections in (1, 20, "ddim25", 1000):
        grid = make_time_grid("ddpm", sections, beta_schedule=betas)
        drawn, seen = solve("ddpm", predict, noise, grid, draw=draw, clip=True)
        np.testing.assert_allclose(drawn, image, atol=1e-3)
        np.testing.assert_allclose(seen, image, atol=1e-3)
        walked, _ = solve("ddim", predict, noise, grid)
        np.testing.assert_allclose(walked, image, atol=1e-3)


def test_bound_is_zero_without_learned_sigma():
    x, noise, predicted, _, step, x_t = loss_case()
    schedule = ddpm.make_schedule()
    squared, bound = ddpm.hybrid_loss_terms(x, noise, predicted, None, step, schedule)
    assert (bound == 0).all() and (squared > 0).any()
    got = ddpm.p_mean_variance(x_t, predicted, None, np.array(7), schedule)
    np.testing.assert_allclose(got.log_variance, np.log(schedule.betas[7]), rtol=1e-6)
