"""Noised copies: later tokens see images clean, and every copy predicts as if its page ended there.

`attention_gpu_test` compares the copies on the GPU kernels.
"""

import dataclasses
import functools

import copies_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copies_cases import LAYOUT, MODEL, TOKENIZER
from fixtures import drawn_params

import monoformer_jax.attention as attention
from monoformer_jax import batch as contract
from monoformer_jax.attention import check_mask, dense_mask, row_masks
from monoformer_jax.attention import mask as mask_module
from monoformer_jax.attention.tpu_kernel import Plan, tpu_attention
from monoformer_jax.batch import PATCH, TEXT
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.sources import SOURCES, Source
from monoformer_jax.errors import InputError
from monoformer_jax.models import base_config, make_config, monoformer
from monoformer_jax.training.losses import Noise, draw_noise, loss_fn, loss_normalizers

PLAN = Plan(queries=128, keys=128, wide=128, chunk_keys=256, chunk_queries=256, vmem_limit=0)


PAGE = ["once", Image(np.zeros((8, 8, 1), np.float32), True), "then"]


def changed(**groups):
    """A config of the model with other values in some groups."""
    values = base_config().to_dict()
    values["batch_size"] = 4
    values["data"] |= {"max_seq_len": cases.LENGTH, "mixture": {"draw": 1.0}}
    values["model"] |= {k: v for k, v in dataclasses.asdict(MODEL).items() if k in values["model"]}
    for name, group in groups.items():
        values[name] |= group
    return make_config(values)


@pytest.fixture(scope="module")
def batch():
    return cases.rows()


@pytest.fixture(scope="module")
def params():
    return drawn_params(MODEL)


@pytest.fixture(scope="module")
def forward(batch):
    """Jitted (params, x_t, times) -> Outputs on dense attention."""
    return jax.jit(lambda params, *noised: monoformer.forward(MODEL, params, batch, *noised))


def test_the_document_is_clean_and_its_copies_follow_it():
    plain, made = cases.document(noised_copies=False), cases.document()
    length = len(plain["tokens"])
    clean, copies = (contract.select(made, s) for s in (slice(length), slice(length, None)))
    for name in set(contract.FIELDS) - {"denoise"}:
        np.testing.assert_array_equal(clean[name], plain[name], err_msg=name)
    assert not clean["denoise"].any() and copies["denoise"].all()
    assert not copies["target_weights"].any() and clean["target_weights"].sum() > 10
    first, second = (h * w // 4 + 1 for h, w in cases.SIZES)
    assert copies["image_ids"].tolist() == [3] * first + [4] * second
    for copy, original in ((3, 1), (4, 2)):
        places = np.flatnonzero(plain["image_ids"] == original)
        here = made["image_ids"] == copy
        assert (made["prefix_stop"][here] == places[0]).all()
        for name in ("positions", "patches", "patch_positions", "token_types", "tokens"):
            np.testing.assert_array_equal(made[name][here], made[name][places], err_msg=name)


def test_an_image_at_the_end_stays_in_its_place_and_other_documents_do_not_change():
    last, alone = cases.document(2, ()), cases.document(1, ())
    assert last["image_ids"].max() == 3 and (last["denoise"] == (last["image_ids"] >= 2)).all()
    for end in ((), ("words",)):
        shown = [cases.shown(part) for part in cases.page(2, end)]
        for copied in (False, True):
            made = build_document(shown, TOKENIZER, LAYOUT, noised_copies=copied)
            assert not made["denoise"].any() and made["image_ids"].max() == 2
    np.testing.assert_array_equal(alone["denoise"], alone["image_ids"] > 0)
    silent = build_document(cases.page(), TOKENIZER, LAYOUT, noised_copies=True,
                            text_beside_images=False)  # fmt: skip
    assert not silent["target_weights"].any()


def test_the_mask_matches_its_docstring():
    lines = [line.split() for line in mask_module.__doc__.splitlines()]
    lines = [line for line in lines if len(line) == 14 and set(line[1:10]) <= {"1", "."}]
    image = Image(np.zeros((2, 2, 1), np.float32), True)
    small = build_document([image, "a"], TOKENIZER, LAYOUT, noised_copies=True)
    masks = row_masks({name: values[None] for name, values in small.items()})
    assert len(lines) == 3 and len(small["tokens"]) == 9
    seen = np.asarray(dense_mask(masks, 9))[0, -3:].tolist()
    assert seen == [[c == "1" for c in line[1:10]] for line in lines]
    ends = [[int(x[0, q]) for m in masks for x in (m.start, m.stop)] for q in (6, 7, 8)]
    assert ends == [[int(c) for c in line[10:]] for line in lines]


def test_the_mask_is_the_union_of_two_ranges(batch):
    """Against a definition per pair: in the document, causal or in one image; copies are seen by
    themselves alone."""
    contract.check(batch, contract.spec(LAYOUT, 4, cases.LENGTH), 6, LAYOUT.vocab_size)
    masks = row_masks(batch)
    check_mask(masks, cases.LENGTH)
    for mask in masks:
        assert (np.diff(mask.start) >= 0).all() and (np.diff(mask.stop) >= 0).all()
    types, segments, images = (batch[k] for k in ("token_types", "segment_ids", "image_ids"))
    q, k = np.indices((cases.LENGTH,) * 2)
    # A copy stands after the </s> of its document.
    ended = np.stack([
        [(batch["tokens"][b, :l][segments[b, :l] == segments[b, l]] == TOKENIZER.eos_id).any()
         for l in range(cases.LENGTH)] for b in range(4)
    ])  # fmt: skip
    for b in range(4):
        same = segments[b][q] == segments[b][k]
        one_image = (images[b][q] == images[b][k]) & (images[b][q] > 0)
        whole = one_image & (types[b][q] == PATCH) & (types[b][k] == PATCH)
        want = same & (segments[b][q] > 0) & ((k <= q) | whole)
        copied = ended[b] & (segments[b] > 0)
        want &= ~copied[k] | one_image  # nothing else sees a copy
        prefix = batch["prefix_stop"][b, :, 0]
        want &= ~copied[q] | one_image | (k < prefix[q])
        np.testing.assert_array_equal(np.asarray(dense_mask(masks, cases.LENGTH))[b], want)


def test_the_clean_stream_does_not_depend_on_the_noise(batch, params, forward):
    clean = jnp.asarray((~batch["denoise"] & (batch["segment_ids"] > 0))[:2], jnp.float32)
    x_t, times = cases.noised(batch)

    def probe(x_t, times):
        out = forward(params, x_t, times)
        weight = jax.random.normal(jax.random.key(2), out.text_hidden[:2].shape)
        return (clean[..., None] * weight * out.text_hidden[:2]).sum()

    to_x, to_times = jax.grad(probe, (0, 1))(x_t, times)
    copied = batch["denoise"][:2] & (batch["token_types"][:2] == PATCH)
    assert copied.sum() > 80 and not np.asarray(to_x[:2])[copied].any()
    assert np.asarray(to_x[:2])[~copied].any()
    assert not np.asarray(to_times)[np.asarray(times) > 0].any()
    one, other = (forward(params, *cases.noised(batch, seed)) for seed in (1, 5))
    keep = np.asarray(clean, bool)
    np.testing.assert_array_equal(one.text_hidden[:2][keep], other.text_hidden[:2][keep])
    assert np.abs(one.prediction[:2] - other.prediction[:2])[copied].min(-1).max() > 1e-3
    assert (batch["token_types"][:2][keep] == TEXT).sum() > 30


def test_a_copy_predicts_as_a_page_cut_after_it(batch, params, forward):
    """Dense attention; packed rows too."""
    found = cases.differences(forward(params, *cases.noised(batch)))
    assert len(found) == 4 and max(found.values()) < 1e-5, found


def test_on_the_tpu_kernel_outputs_and_gradients_are_the_same(batch, params, forward, monkeypatch):
    x_t, times = cases.noised(batch)
    calls = []

    def run(q, k, v, mask):
        calls.append(mask)
        return tpu_attention(q, k, v, mask, chip="TPU v5e", plan=PLAN, interpret=True)

    def loss(params, x_t, dense):
        with monkeypatch.context() as patch:
            if not dense:
                patch.setattr(attention, "_runner", lambda impl, kind: run)
            out = monoformer.forward(MODEL, params, batch, x_t, times)
        real = (batch["segment_ids"] > 0)[..., None]
        total = (jnp.cos(out.text_hidden) * real).sum() + (out.prediction**2 * real).sum()
        return total, out

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, dense=dense), (0, 1), has_aux=True))(
            params, x_t
        )
        for dense in (True, False)
    ]
    assert len(calls) == 2  # one call for each range, in the scanned block
    found = cases.differences(results[1][0][1])
    assert max(found.values()) < 1e-5, found
    for got, want in zip(*(jax.tree.leaves(grads) for _, grads in results)):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(float(jnp.abs(want).max()), 1))


def test_rows_without_copies_make_one_kernel_call(batch, params, monkeypatch):
    calls = []

    def run(q, k, v, mask):
        calls.append(mask)
        return attention.dense_attention(q, k, v, mask)

    monkeypatch.setattr(attention, "_runner", lambda impl, kind: run)
    made = cases.noised(batch)
    for width in (0, 1):
        fields = dict(batch) | {"prefix_stop": batch["prefix_stop"][..., :width]}
        calls.clear()
        jax.eval_shape(functools.partial(monoformer.forward, MODEL), params, fields, *made)
        assert len(calls) == 1 + width


def test_the_image_loss_is_the_mean_over_the_copies(batch, params, forward):
    x_t, times = cases.noised(batch)
    patch = (batch["denoise"] & (batch["token_types"] == PATCH))[..., None]
    t = np.where(
        patch, np.take_along_axis(np.asarray(times), batch["image_ids"] - 1, 1)[..., None], 1
    )
    noise = np.where(patch, (x_t - (1 - t) * batch["patches"]) / t, 0).astype(np.float32)
    made = Noise(times, jnp.asarray(noise))
    _, parts = jax.jit(functools.partial(loss_fn, config=changed()))(
        params, batch, made, loss_normalizers(batch, made)
    )
    found = cases.predictions(batch, forward(params, x_t, times))
    of_image = []
    for b in range(4):
        for number in np.unique(batch["image_ids"][b][patch[b, :, 0]]):
            here = (batch["image_ids"][b] == number) & patch[b, :, 0]
            target = noise[b, here] - batch["patches"][b, here]
            of_image.append(((found[b, int(number)] - target) ** 2).mean())
    assert len(of_image) == 7
    np.testing.assert_allclose(parts["image_loss"], np.mean(of_image), rtol=1e-5)


def test_with_a_noise_limit_images_that_something_follows_are_noised_less():
    pages = [build_document(cases.page(2, end), TOKENIZER, MODEL.layout) for end in ((), ("x",))]
    rows = contract.stack([pages[0], pages[1]], cases.LENGTH, 0)
    keys = jax.random.split(jax.random.key(0))
    for kind, solver in (("rectified_flow", "heun"), ("ddpm", "ddpm")):
        free, limited = (
            np.asarray(draw_noise(*keys, rows, changed(
                objective={"kind": kind, "noise_limit": most}, sampling={"solver": solver}
            )).times) for most in (1.0, 0.5)
        )  # fmt: skip
        followed = np.array([[True, False], [True, True]])
        np.testing.assert_array_equal(limited[:, :2][~followed], free[:, :2][~followed])
        np.testing.assert_allclose(limited[:, :2][followed], free[:, :2][followed] / 2, atol=1e-3)
        assert (free[:, :2] > 0).all() and not limited[:, 2:].any()
        if kind == "ddpm":
            np.testing.assert_allclose(limited * 1000, np.rint(limited * 1000), atol=1e-3)


def test_the_pipeline_makes_copies_and_leaves_the_digits_alone(monkeypatch):
    monkeypatch.setitem(SOURCES, "page", lambda c, channels: Source(range(9), lambda n, rng: PAGE))
    config = changed(data={"noised_copies": True, "mixture": {"page": 1.0, "draw": 1.0}})
    made = next(Batches(config, TOKENIZER).iterator)
    layout, rows = config.layout, config.batch_size
    contract.check(
        made, contract.spec(layout, rows, cases.LENGTH), config.max_images, layout.vocab_size
    )
    prefix = row_masks(made)[1]
    copied = np.asarray(prefix.start < prefix.stop)
    assert not (copied & ~made["denoise"]).any()
    assert copied.any() and (made["denoise"] & ~copied).any()
    digits = {"mixture": {"draw": 1.0, "read": 1.0, "say": 1.0}}
    plain, other = (
        next(Batches(changed(data=digits | {"noised_copies": on}), TOKENIZER).iterator)
        for on in (False, True)
    )
    for name in set(contract.FIELDS) - {"prefix_stop"}:
        np.testing.assert_array_equal(plain[name], other[name], err_msg=name)
    # A sampler's blocks have the field too, and no copies.
    block = contract.spec(layout, 2, 64)
    state = monoformer.init_state(config.model, 2)
    params = jax.eval_shape(lambda: monoformer.init(config.model, jax.random.key(0)))
    extended = jax.eval_shape(
        lambda p, b: monoformer.extend(config.model, p, state, b, 64), params, block
    )
    assert extended.hidden.shape == (2, config.model.embed_dim)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data": {"noised_copies": True}, "objective": {"noise_limit": 0.5}},
         "data.noised_copies shows images clean and objective.noise_limit noised"),
        ({"data": {"noised_copies": True}, "model": {"feature_dim": 8}}, "model.feature_dim must be 0"),
        ({"objective": {"noise_limit": 1.5}}, "objective.noise_limit=1.5 must be 1 or less"),
        ({"objective": {"noise_limit": 0.0}}, "objective.noise_limit=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        changed(**overrides)


def test_a_model_without_text_has_no_copies():
    values = base_config("diffussm").to_dict()
    values["data"] |= {"noised_copies": True}
    with pytest.raises(InputError, match=r"noised_copies needs a model .* this one has no text"):
        make_config(values)
