"""The two losses against loops over rows, images and tokens; noise on denoised images only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import logits_of, output_of

from monoformer_jax.attention import interval_mask
from monoformer_jax.batch import PATCH
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.models import monoformer
from monoformer_jax.training.losses import draw_noise, loss_fn, loss_normalizers
from monoformer_jax.training.state import draw_inputs
from monoformer_jax.training.text_loss import text_loss


@pytest.fixture(scope="module")
def batch(config):
    return next(Batches(config, ByteTokenizer()).iterator)


@pytest.fixture(scope="module")
def params(config):
    return monoformer.init(config.model, jax.random.key(0))


@pytest.fixture(scope="module")
def noise(config, batch):
    return draw_noise(*jax.random.split(jax.random.key(1)), batch, config)


def compiled(config):
    return jax.jit(lambda *arguments: loss_fn(*arguments, config))


def test_losses_equal_loops_over_images_and_tokens(change, params, batch, noise):
    config = change(loss={"text_weight": 0.5, "image_weight": 2.0})
    rng = np.random.default_rng(0)
    batch = dict(batch)
    batch["target_weights"] = batch["target_weights"] * rng.uniform(0.5, 2, batch["tokens"].shape)
    got, parts = compiled(config)(params, batch, noise, loss_normalizers(batch, noise))

    model = monoformer.bind(config.model, params)
    noised = np.array(batch["patches"])
    per_image = []
    for b, l in np.argwhere(batch["token_types"] == PATCH):
        t = noise.times[b, batch["image_ids"][b, l] - 1]
        noised[b, l] = (1 - t) * batch["patches"][b, l] + t * noise.noise[b, l]
    mask = interval_mask(batch["token_types"], batch["segment_ids"], batch["image_ids"])
    hidden, _ = model(batch | {"patches": noised}, noise.times, mask)
    velocity = np.asarray(output_of(model, hidden, batch["image_ids"], noise.times))
    for b in range(len(noised)):
        for image in range(1, batch["image_ids"][b].max() + 1):
            here = (batch["image_ids"][b] == image) & (batch["token_types"][b] == PATCH)
            if batch["denoise"][b][here].all():
                target = noise.noise[b][here] - batch["patches"][b][here]
                per_image.append(np.mean((velocity[b][here] - target) ** 2))
    logits = np.asarray(logits_of(model, hidden), np.float64)
    nll, weight = 0.0, 0.0
    for b, l in np.argwhere(batch["target_weights"] > 0):
        row = logits[b, l]
        log_sum = row.max() + np.log(np.exp(row - row.max()).sum())
        nll += (log_sum - row[batch["targets"][b, l]]) * batch["target_weights"][b, l]
        weight += batch["target_weights"][b, l]

    assert len(per_image) > 3
    np.testing.assert_allclose(parts["image_loss"], np.mean(per_image), rtol=1e-5)
    np.testing.assert_allclose(parts["text_loss"], nll / weight, rtol=1e-5)
    np.testing.assert_allclose(got, 0.5 * nll / weight + 2 * np.mean(per_image), rtol=1e-5)


def test_context_images_are_clean_and_denoised_ones_are_not(batch, noise):
    seen = set()
    for b, l in np.argwhere(batch["token_types"] == PATCH):
        t = float(noise.times[b, batch["image_ids"][b, l] - 1])
        denoised = bool(batch["denoise"][b, l])
        assert (0 < t < 1) if denoised else t == 0
        seen.add(denoised)
    assert seen == {True, False}


def test_latents_noise_levels_and_noise_are_independent(config):
    """Correlations over 10^5 steps; with one key for two of them, theirs is 1."""
    token_types = jnp.array([[2, PATCH]])
    batch = {"token_types": token_types, "denoise": token_types > 0,
             "image_ids": jnp.ones((1, 2), jnp.int32), "patches": jnp.zeros((1, 2, 4)),
             "patch_logvar": jnp.zeros((1, 2, 4))}  # fmt: skip
    drawn, noise = jax.jit(jax.vmap(lambda step: draw_inputs(step, batch, config)))(
        jnp.arange(100_000)
    )
    latents, noises = drawn["patches"][:, 0, 1], noise.noise[:, 0, 1]
    levels = jnp.repeat(jax.scipy.special.logit(noise.times[:, 0, :1]), 4, axis=1)
    values = np.stack([np.ravel(x) for x in (latents, noises, levels)])
    np.testing.assert_allclose(values.std(1), 1, atol=0.01)
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.01


def test_images_of_all_sizes_have_equal_weight(config, params):
    """Two images of different sizes: the loss is the mean of their two losses, not of their patches."""
    tokenizer = ByteTokenizer()
    rng = np.random.default_rng(0)

    def one_row(images):
        document = build_document([Image(x, True) for x in images], tokenizer, config.model.layout)
        row = {k: v[None] for k, v in document.items()}
        # Each image in a segment of its own, so that neither changes what the other one sees.
        row["segment_ids"] = 1 + np.maximum(np.cumsum(document["token_types"] == 2) - 1, 0)[None]
        return row

    small, large = rng.normal(size=(2, 2, 1)), rng.normal(size=(8, 6, 1))
    both = one_row([small, large])
    noise = draw_noise(*jax.random.split(jax.random.key(0)), both, config)
    loss = compiled(config)
    _, parts = loss(params, both, noise, loss_normalizers(both, noise))
    alone = []
    for image in (1, 2):
        only = dict(both)
        only["denoise"] = both["denoise"] & (both["image_ids"] == image)
        whole = loss_normalizers(only, noise).replace(images=jnp.float32(1))
        alone.append(loss(params, only, noise, whole)[1]["image_loss"])
    np.testing.assert_allclose(parts["image_loss"], np.mean(alone), rtol=1e-5)


def test_a_batch_without_images_or_without_targets_has_loss_zero(config, params, batch, noise):
    none = dict(batch) | {
        "denoise": np.zeros_like(batch["denoise"]),
        "target_weights": np.zeros_like(batch["target_weights"]),
    }
    noise = draw_noise(*jax.random.split(jax.random.key(1)), none, config)
    (loss, _), grads = jax.value_and_grad(compiled(config), has_aux=True)(
        params, none, noise, loss_normalizers(none, noise)
    )
    assert loss == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_noise_does_not_depend_on_micro_batches(config, batch, params, noise):
    """Losses of micro-batches with the normalizers of the full batch sum to its loss."""
    whole = loss_normalizers(batch, noise)
    loss_of = compiled(config)
    loss, _ = loss_of(params, batch, noise, whole)
    halves = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        cut = jax.tree.map(lambda x, part=part: x[part], (dict(batch), noise))
        halves += loss_of(params, *cut, whole)[0]
    np.testing.assert_allclose(halves, loss, rtol=1e-5)


def test_noise_level_parameters_get_gradients(config, params, batch, noise):
    """The image loss has a gradient for all noise level parameters, at the start and after a step.

    The original zeroes both layers of the time token's projector, so their gradient stays zero.
    """

    def image_loss(params):
        return loss_fn(params, batch, noise, loss_normalizers(batch, noise), config)[1][
            "image_loss"
        ]

    gradient = jax.jit(jax.grad(image_loss))
    for _ in range(2):
        grads = gradient(params)
        time_path = [
            grads["time_embedding"],
            grads["time_token"],
            grads["image_head"]["modulation"],
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(time_path):
            assert jnp.abs(leaf).max() > 1e-8, path
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


REAL, WIDTH = 200, 256  # of a vocabulary and of its table


def text_inputs():
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((3, 20, 16), (16, WIDTH)))
    weights = rng.uniform(0.5, 2, (3, 20)) * (rng.uniform(size=(3, 20)) < 0.4)
    return hidden, head, rng.integers(0, REAL, (3, 20)), weights.astype(np.float32)


@pytest.mark.parametrize("tokens", [7, 1000])
def test_the_chunked_text_loss_equals_that_of_full_logits(tokens):
    hidden, head, targets, weights = text_inputs()

    def whole(hidden, head):
        logits = jnp.where(jnp.arange(WIDTH) < REAL, hidden @ head, jnp.finfo(jnp.float32).min)
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    def chunked(hidden, head):
        return text_loss(hidden, head, targets, weights, REAL, most_logits=tokens * WIDTH)

    want, want_grads = jax.value_and_grad(whole, (0, 1))(hidden, head)
    got, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(chunked(hidden, head), want, rtol=1e-6)
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))
    assert (grads[1][:, REAL:] == 0).all()  # the padding of the table has probability 0


def test_chunks_without_a_target_are_not_visited():
    """NaN in skipped chunks does not affect the loss; the first chunk is a quarter of the others."""
    hidden, head, targets, weights = text_inputs()
    hidden = np.where(weights[..., None] > 0, hidden, np.nan)
    count = int((weights > 0).sum())

    def loss(hidden):
        return text_loss(hidden, head, targets, weights, REAL, most_logits=4 * count * WIDTH)

    value, grads = jax.value_and_grad(loss)(hidden)
    assert np.isfinite(value) and np.isfinite(grads).all()
    assert (grads[weights == 0] == 0).all()


def test_full_logits_are_never_materialized():
    """1024 tokens and 8192 vocabulary entries: 32 MiB of logits, 2 MiB at a time."""
    shapes = ((1, 1024, 8), (8, 8192), (1, 1024), (1, 1024))
    kinds = (np.float32, np.float32, np.int32, np.float32)
    inputs = [jax.ShapeDtypeStruct(s, k) for s, k in zip(shapes, kinds)]
    loss = jax.value_and_grad(lambda *args: text_loss(*args, 8192, most_logits=64 * 8192), (0, 1))
    compiled = jax.jit(loss).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 2**20


def test_save_names_saves_the_named_activations(config, params, batch, noise):
    """Residuals of the scanned blocks, by their shapes [layers, B, L, heads, H]."""

    def kept(remat):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))

        def backward(params):
            return jax.vjp(
                lambda p: loss_fn(p, batch, noise, loss_normalizers(batch, noise), changed)[0],
                params,
            )[1]

        shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, params))]
        c = config.model
        rows = (c.num_layers, *batch["tokens"].shape)
        return tuple(shapes.count((*rows, n, c.head_dim)) for n in (c.num_heads, c.num_kv_heads))

    assert kept("nothing_saveable") == (0, 0)
    assert kept("save_names:attention_out") == (1, 0)
    assert kept("save_names:qkv") == (1, 2)
    assert kept("save_names:qkv,attention_out") == (2, 2)
