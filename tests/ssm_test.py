"""Both forms of the bidirectional state-space model against the plain recurrence in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monoformer_jax.errors import InputError
from monoformer_jax.nn import ssm

DIM, STATES = 3, 64


def make(dim=DIM):
    """A module, and its parameters with the steps spread over the whole range."""
    module = ssm.BidirectionalSSM(dim, STATES, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    for one in params.values():
        one["log_step"] = jnp.linspace(*map(math.log, ssm.STEPS), dim)
    return nnx.graphdef(module), params


def recurrence(params, u):
    """h_l = exp(dt A) h_{l-1} + (exp(dt A) - 1) / A u_l; y_l = 2 Re(C h_l) + skip u_l. [L, D]."""
    step = jnp.exp(params["log_step"])[:, None]
    a = -jnp.exp(params["log_decay"]) + 1j * params["frequency"]
    a = a.reshape(len(step), -1)
    c = params["output"][..., 0] + 1j * params["output"][..., 1]
    decay = jnp.exp(step * a)

    def one(state, x):
        state = decay * state + (decay - 1) / a * x[:, None]
        return state, 2 * (c * state).real.sum(-1) + params["skip"] * x

    return jax.lax.scan(one, jnp.zeros_like(a), u)[1]


def both_directions(params, u):
    """[L, D] -> [L, 2, D]."""
    backward = recurrence(params["backward"], u[::-1])[::-1]
    return jnp.stack([recurrence(params["forward"], u), backward], 1)


@pytest.mark.parametrize("length", [64, 1024, 4096])
def test_outputs_and_gradients_are_those_of_the_recurrence(length):
    graph, params = make()
    random = np.random.default_rng(length)
    u = random.normal(size=(1, length, DIM)).astype(np.float32)
    weight = random.normal(size=(1, length, 2, DIM)).astype(np.float32)

    def outputs(run):
        def loss(params, u):
            y = run(params, u)
            return (y * weight).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, u)
        return {"y": y} | {
            jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(gradients)
        }

    with jax.enable_x64(True):
        params64, u64 = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, u))
        params, u, kept = params64, u64, (params, u)
        want = jax.device_get(outputs(lambda p, u: both_directions(p, u[0])[None]))
        assert want["y"].dtype == np.float64
    params, u = kept
    for form in ("fft", "chunked"):
        found = outputs(lambda p, u, form=form: nnx.merge(graph, p)(u, form))
        assert found.keys() == want.keys()
        for name, value in found.items():
            error = np.abs(value - want[name]).max() / np.abs(want[name]).max()
            assert error <= 1e-5, f"{form}: {name} is off by {error:.1e} of its largest value"


def test_initialisation_is_s4d_lin():
    params = nnx.to_pure_dict(nnx.state(ssm.BidirectionalSSM(512, STATES, nnx.Rngs(1)), nnx.Param))
    one = params["forward"]
    np.testing.assert_allclose(np.exp(one["log_decay"]), 0.5, rtol=1e-6)
    frequency = one["frequency"].reshape(512, -1)
    np.testing.assert_allclose(frequency, np.tile(np.pi * np.arange(32), (512, 1)), rtol=1e-6)
    steps = np.sort(one["log_step"])
    assert math.log(1e-3) <= steps[0] < math.log(1.1e-3) and math.log(0.09) < steps[-1]
    assert abs(np.mean(steps) - math.log(1e-2)) < 0.2
    assert abs(np.square(one["output"]).sum(-1).mean() - 1) < 0.05
    assert not np.array_equal(one["output"], params["backward"]["output"])


def test_bfloat16_states_are_float32():
    """A constant input over 512 chunks: a state in bfloat16 would stop growing long before."""
    graph, params = make(dim=4)
    u = jnp.ones((1, 1024, 4))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        want = jax.device_get(both_directions(exact, np.float64(u[0]))[None])
    run = jax.jit(lambda params, u: nnx.merge(graph, params)(u, "chunked", 2))
    got = run(params, u.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.float32(got) - want).max() / np.abs(want).max() < 0.03


def test_a_length_that_is_no_multiple_of_the_chunk():
    graph, params = make()

    def shape(form):
        u = jax.ShapeDtypeStruct((1, 96, DIM), "float32")
        return jax.eval_shape(lambda p, u: nnx.merge(graph, p)(u, form, 64), params, u).shape

    with pytest.raises(InputError, match="sequence of 96 is not a multiple of the chunk of 64"):
        shape("chunked")
    assert shape("auto") == shape("fft") == (1, 96, 2, DIM)


def test_flops_of_the_chunked_form_match_xla():
    """XLA counts the Toeplitz products in full, and neither the exponentials nor the kernels twice."""
    graph, params = make(dim=64)
    u = jax.ShapeDtypeStruct((8, 512, 64), "float32")
    kernels = jax.eval_shape(lambda p: nnx.merge(graph, p).kernels(), params)
    run = jax.jit(lambda k, u: ssm.convolve(k, u, "chunked", 128))
    counted = run.lower(kernels, u).compile().cost_analysis()["flops"]
    fixed = run.lower(kernels, jax.ShapeDtypeStruct((4, 512, 64), "float32"))
    fixed = 2 * fixed.compile().cost_analysis()["flops"] - counted  # of the kernels
    want = 8 * ssm.flops("chunked", 512, 64, STATES, 128)
    assert want < counted - fixed < 1.1 * want
