"""The model: attention pattern by gradients, cache, noise levels, and layers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_test import by_definition, row
from fixtures import logits_of

from monoformer_jax.attention import IntervalMask, interval_mask
from monoformer_jax.batch import PAD, PATCH, TIME
from monoformer_jax.models import monoformer, named_size
from monoformer_jax.models.monoformer import MonoFormerConfig, bind, sincos_2d
from monoformer_jax.nn.decoder import KVCache
from monoformer_jax.nn.layers import RMSNorm, rope, rotate_by_product

MODEL = MonoFormerConfig(**named_size("tiny"))
LENGTH, IMAGES = 24, 4
ROWS = {
    "images and documents": row([0, 0, 4, 2, 0], [0, 3, 0], [0, 0], length=LENGTH),
    "image first and last": row([4, 0], [0, 2, 4], length=LENGTH),
    "one-token documents": row([0], [1], [0], [0, 0, 6, 0], length=LENGTH),
}


@pytest.fixture(scope="module")
def params():
    return monoformer.init(MODEL, jax.random.key(0))


def stream(name):
    """Model inputs of one row with random tokens and patches."""
    token_types, segments, images = ROWS[name]
    rng = np.random.default_rng(1)
    is_patch = token_types == PATCH
    first = np.maximum.accumulate(
        np.where(np.diff(segments, prepend=-1) != 0, np.arange(LENGTH), 0), axis=1
    )
    return {
        "tokens": rng.integers(6, 200, token_types.shape).astype(np.int32),
        "token_types": token_types,
        "segment_ids": segments,
        "positions": (np.arange(LENGTH)[None] - first).astype(np.int32),
        "image_ids": images,
        "patches": (rng.normal(size=(*token_types.shape, 4)) * is_patch[..., None]).astype(
            np.float32
        ),
        "patch_positions": (
            rng.integers(0, 3, (*token_types.shape, 2)) * is_patch[..., None]
        ).astype(np.int32),
    }


def mask_of(inputs):
    return interval_mask(*(inputs[k] for k in ("token_types", "segment_ids", "image_ids")))


@pytest.mark.parametrize("name", ROWS)
def test_gradients_follow_the_attention_mask(params, name):
    inputs = stream(name)
    model, mask = bind(MODEL, params), mask_of(inputs)
    embedded = model.embed(inputs, jnp.full((1, IMAGES), 0.5))

    @jax.jit
    def sensitivity(embedded):
        def output(x, q):
            hidden, _ = model.decoder(x, inputs["positions"], mask)
            return (hidden[0, q] * jnp.linspace(0.5, 1.5, hidden.shape[-1])).sum()

        gradients = jax.vmap(jax.grad(output), (None, 0))(embedded, jnp.arange(LENGTH))
        return jnp.abs(gradients[:, 0]).max(-1)  # [query, key]

    seen = np.asarray(sensitivity(embedded))
    allowed = by_definition(*ROWS[name])
    np.fill_diagonal(allowed, True)  # the residual stream of a PAD reaches its own output
    assert (seen[~allowed] == 0).all()
    assert (seen[allowed] > 1e-7).all()


def test_outputs_do_not_depend_on_packing(params):
    """The second document alone in a row, and after another one."""
    packed = stream("images and documents")
    here = packed["segment_ids"][0] == 2
    n = here.sum()
    alone = {}
    for name, values in packed.items():
        alone[name] = np.zeros_like(values)
        alone[name][0, :n] = values[0, here]
    in_image = (alone["token_types"] == TIME) | (alone["token_types"] == PATCH)
    alone["image_ids"] = in_image.astype(np.int32)
    times = jnp.array([[0.1, 0.2, 0.7, 0.0]])  # its image is the third of the packed row
    model = bind(MODEL, params)
    a, _ = model(packed, times, mask_of(packed))
    b, _ = model(alone, jnp.full((1, IMAGES), 0.7), mask_of(alone))
    np.testing.assert_allclose(a[0, here], b[0, :n], atol=2e-6)


def test_cached_steps_equal_one_full_pass(params):
    """Text token by token and each image as one block equal one pass over the row."""
    inputs = stream("images and documents")
    model, mask = bind(MODEL, params), mask_of(inputs)
    times = jnp.array([[0.3, 0.6, 0.9, 0.0]])
    full, _ = model(inputs, times, mask)
    cache, got, at = KVCache.create(MODEL, 1, LENGTH), [], 0
    step = jax.jit(lambda part, mask, cache: model(part, times, mask, cache))
    while at < LENGTH:
        end = at + 1
        while (
            end < LENGTH and inputs["token_types"][0, at] == inputs["token_types"][0, end] == PATCH
        ):
            end += inputs["image_ids"][0, at] == inputs["image_ids"][0, end]
            if inputs["image_ids"][0, end - 1] != inputs["image_ids"][0, at]:
                break
        part = {k: v[:, at:end] for k, v in inputs.items()}
        out, cache = step(part, IntervalMask(mask.start[:, at:end], mask.stop[:, at:end]), cache)
        got.append(out)
        at = end
    real = inputs["token_types"][0] != PAD
    np.testing.assert_allclose(np.concatenate(got, 1)[0, real], full[0, real], atol=1e-5)


def test_every_part_of_the_input_matters(params):
    """Tokens, patch values, positions and noise levels affect the outputs that depend on them."""
    inputs = stream("images and documents")
    model, mask = bind(MODEL, params), mask_of(inputs)
    times = jnp.full((1, IMAGES), 0.5)
    base, _ = model(inputs, times, mask)
    last_of_first = np.flatnonzero(inputs["segment_ids"][0] == 1)[-1]
    patch = np.flatnonzero(inputs["token_types"][0] == PATCH)[0]
    for name, at in (("tokens", 0), ("patches", patch), ("patch_positions", patch)):
        changed = {k: v.copy() for k, v in inputs.items()}
        changed[name][0, at] += 1
        out, _ = model(changed, times, mask)
        assert np.abs(out[0, last_of_first] - base[0, last_of_first]).max() > 1e-5, name
    out, _ = model(inputs, times.at[0, 0].set(0.9), mask)
    assert np.abs(out[0, last_of_first] - base[0, last_of_first]).max() > 1e-5


def test_scan_and_remat_do_not_change_outputs(params):
    inputs = stream("images and documents")
    times = jnp.full((1, IMAGES), 0.5)
    scanned, _ = bind(MODEL, params)(inputs, times, mask_of(inputs))
    model = bind(MODEL, params)
    x, mask = model.embed(inputs, times), mask_of(inputs)
    for i in range(MODEL.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], model.decoder.layers)
        x, _ = layer(x, inputs["positions"], mask, None, None)
    np.testing.assert_allclose(model.decoder.norm(x), scanned, atol=1e-6)

    def loss(params, remat, unroll):
        config = MonoFormerConfig(**named_size("tiny") | {"remat": remat, "scan_unroll": unroll})
        hidden, _ = bind(config, params)(inputs, times, mask)
        return (hidden**2).mean()

    first, *others = [
        jax.jit(jax.grad(loss), static_argnums=(1, 2))(params, *how)
        for how in (("none", 1), ("nothing_saveable", 1), ("nothing_saveable", 6))
    ]
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, other)


def test_bfloat16_stays_close_to_float32(params):
    inputs = stream("images and documents")
    times = jnp.full((1, IMAGES), 0.5)
    half = MonoFormerConfig(**named_size("tiny") | {"dtype": "bfloat16"})
    a, _ = bind(MODEL, params)(inputs, times, mask_of(inputs))
    b, _ = bind(half, params)(inputs, times, mask_of(inputs))
    assert b.dtype == jnp.bfloat16
    np.testing.assert_allclose(a, b.astype(np.float32), atol=0.08)


def test_padding_of_the_vocabulary_has_probability_zero(params):
    logits = logits_of(bind(MODEL, params), jnp.ones((1, 1, MODEL.embed_dim)))
    probability = jax.nn.softmax(logits)[0, 0]
    assert MODEL.padded_vocab > MODEL.vocab_size
    assert (probability[MODEL.vocab_size :] == 0).all()
    assert probability[: MODEL.vocab_size].sum() == pytest.approx(1)


def test_rope_is_a_rotation_by_position_times_frequency():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7, 100, 3]], np.int32)
    z = x[..., :4] + 1j * x[..., 4:]
    angle = positions[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = z * np.exp(1j * angle)
    got = rope(jnp.asarray(x), positions, 10_000.0)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


@pytest.mark.parametrize("heads, dim", [(4, 64), (3, 64), (1, 128), (5, 8)])
def test_the_rotation_by_a_product_and_its_gradient(heads, dim):
    """Against float64, and bit for bit against the halves."""
    rng = np.random.default_rng(0)
    x, cotangent = rng.uniform(-1, 1, (2, 2, 6, heads, dim)).astype(np.float32)
    positions = rng.integers(0, 2048, (2, 6)).astype(np.int32)
    frequency = 10_000.0 ** -(jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)

    def rotated(x, turn):
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :].astype(np.float64)) * turn
        return np.concatenate([z.real, z.imag], -1)

    got, pull = jax.vjp(lambda x: rotate_by_product(x, cos, sin), x)
    np.testing.assert_allclose(got, rotated(x, turn), atol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], rotated(cotangent, turn.conj()), atol=1e-6)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, cotangent = x.astype(dtype), cotangent.astype(dtype)
        theirs, pull_theirs = jax.vjp(lambda x: rope(x, positions, 10_000.0), x)
        ours, pull_ours = jax.vjp(lambda x: rotate_by_product(x, cos, sin), x)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(pull_ours(cotangent)[0], pull_theirs(cotangent)[0])


def test_rms_norm_by_hand():
    x = np.array([[3.0, -4.0]], np.float32)
    np.testing.assert_allclose(RMSNorm(2, 0.0)(x), x / np.sqrt(12.5), rtol=1e-6)


def test_grid_embedding_is_that_of_dit():
    """Column, then row; sines before cosines (float64 reference)."""
    patch_positions, dim = np.array([[0, 0], [2, 5], [15, 1]]), 16
    omega = 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4))
    want = []
    for r, c in patch_positions:
        want.append(np.concatenate([f(p * omega) for p in (c, r) for f in (np.sin, np.cos)]))
    np.testing.assert_allclose(sincos_2d(jnp.asarray(patch_positions), dim), want, atol=2e-6)
