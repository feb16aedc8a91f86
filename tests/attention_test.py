"""The mask against the matrix of its docstring, dense attention against plain softmax, and every
implementation against dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, all_rows, assert_within_limits, errors, last_queries, row, split
from jax.experimental.pallas import tpu as pltpu

from monoformer_jax.attention import (
    IntervalMask,
    attend,
    check_mask,
    choose,
    dense_mask,
    interval_mask,
    mask,
    mask_area,
)
from monoformer_jax.attention.dense import EMPTY_LSE, dense_attention
from monoformer_jax.attention.tpu_kernel import Plan, fit, tpu_attention
from monoformer_jax.batch import PATCH

# Several blocks and chunks a row, so that every loop and every edge between chunks is taken.
SMALL = Plan(
    queries=128, keys_forward=128, keys_backward=128, chunk_keys=256, chunk_queries=256, vmem_limit=0
)
interpreted = functools.partial(tpu_attention, chip="TPU v5e", plan=SMALL, interpret=True)
ON_CPU = {"dense": dense_attention, "tpu": interpreted}


ROWS = {
    "docstring": row([0, 0, 0, 3, 0, 0], [0, 0], length=12),
    "several images": row([0, 3, 1, 0], [1], [0], length=12),
    "image last, no padding": row([0, 0], [0, 0, 7], length=12),
    "one-token documents": row([0], [0], [0, 1], [0], length=12),
    "nothing but padding": row(length=12),
}


def by_definition(kinds, segments, images):
    """Causal or same image, within a document; written over pairs, with no interval in sight."""
    kinds, segments, images = (np.asarray(x)[0] for x in (kinds, segments, images))
    n = len(kinds)
    allowed = np.zeros((n, n), bool)
    for q in range(n):
        for k in range(n):
            same = kinds[q] == kinds[k] == PATCH and images[q] == images[k]
            allowed[q, k] = segments[q] == segments[k] > 0 and (k <= q or same)
    return allowed


def assert_monotone(got):
    assert (np.diff(got.start) >= 0).all() and (np.diff(got.stop) >= 0).all()


def test_mask_is_the_matrix_of_the_docstring():
    lines = [line.split() for line in mask.__doc__.splitlines()]
    lines = [line for line in lines if len(line) == 15 and set(line[1:13]) <= {"1", "."}]
    drawn = np.array([[c == "1" for c in line[1:13]] for line in lines])
    ends = np.array([[int(c) for c in line[13:]] for line in lines])
    assert drawn.shape == (12, 12)
    got = interval_mask(*ROWS["docstring"])
    np.testing.assert_array_equal(dense_mask(got, 12)[0], drawn)
    np.testing.assert_array_equal(jnp.stack([got.start[0], got.stop[0]], 1), ends)


@pytest.mark.parametrize("name", ROWS)
def test_mask_is_causal_or_same_image(name):
    got = interval_mask(*ROWS[name])
    np.testing.assert_array_equal(dense_mask(got, 12)[0], by_definition(*ROWS[name]))
    assert_monotone(got)


def test_padding_on_the_left():
    """Prompts of a batch end together, so sampling pads on the left."""
    streams = [np.roll(s, 5, axis=1) for s in row([0, 0, 3, 0], length=12)]
    got = interval_mask(*streams)
    np.testing.assert_array_equal(dense_mask(got, 12)[0], by_definition(*streams))
    assert_monotone(got)


def random_qkv(length, keys, heads, kv_heads, head_dim=8, dtype=jnp.float32):
    keys_ = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, heads, head_dim), *[(1, keys, kv_heads, head_dim)] * 2]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys_, shapes)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ROWS)
def test_dense_attention_is_softmax_over_the_allowed_keys(name, groups):
    got_mask = interval_mask(*ROWS[name])
    length = got_mask.start.shape[1]
    q, k, v = random_qkv(length, length, 4, 4 // groups)
    out, lse = map(np.asarray, jax.jit(dense_attention)(q, k, v, got_mask))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    allowed = by_definition(*ROWS[name])
    for n in range(4):
        scores = q[0, :, n] @ k[0, :, n // groups].T
        scores /= np.sqrt(8)
        for l in range(length):
            seen = np.flatnonzero(allowed[l])
            if not len(seen):
                assert (out[0, l, n] == 0).all() and lse[0, l, n] == np.float32(EMPTY_LSE)
                continue
            weights = np.exp(scores[l, seen])
            want = weights @ v[0, seen, n // groups] / weights.sum()
            np.testing.assert_allclose(out[0, l, n], want, atol=2e-6)
            np.testing.assert_allclose(lse[0, l, n], np.log(weights.sum()), atol=2e-6)


def test_an_empty_query_passes_no_gradient():
    q, k, v = random_qkv(6, 6, 2, 2)
    empty = IntervalMask(jnp.full((1, 6), 3, jnp.int32), jnp.full((1, 6), 3, jnp.int32))

    def loss(q, k, v):
        out, lse = dense_attention(q, k, v, empty)
        return (out**2).sum() + out.sum() + (lse * 1e-30).sum()

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        np.testing.assert_array_equal(gradient, 0)


def test_attend_says_what_does_not_fit():
    q, k, v = random_qkv(4, 4, 4, 3)
    fits = IntervalMask(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attend(q, k, v, fits)
    with pytest.raises(ValueError, match="'flash' is none of"):
        attend(q, q, q, fits, impl="flash")
    with pytest.raises(ValueError, match="mask is"):
        attend(q, q, q, IntervalMask(fits.start[:, :2], fits.stop[:, :2]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ON_CPU)
def test_every_implementation_agrees_with_the_dense_oracle(impl, name):
    """Output, log-sum-exp, dq, dk and dv, with gradients through both results."""
    assert_within_limits(CASES[name], errors(CASES[name], ON_CPU[impl]))
