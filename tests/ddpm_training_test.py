"""objective.kind = ddpm from end to end on the digits, and a run that starts from another's weights."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import output_of

from monoformer_jax.batch import unpatchify
from monoformer_jax.data.documents import Features, Image, build_document
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.diffusion import ddpm
from monoformer_jax.errors import InputError
from monoformer_jax.models import make_config, monoformer
from monoformer_jax.models.monoformer import OriginalConfig
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training.loop import train
from monoformer_jax.training.losses import draw_noise, loss_fn, loss_normalizers

TOKENIZER = ByteTokenizer()
DDPM = {
    "objective": {"kind": "ddpm", "learn_sigma": True},
    "sampling": {"solver": "ddim", "steps": 3},
}


@pytest.mark.slow
def test_it_trains_samples_and_starts_another_run(change, tmp_path):
    config = change(**DDPM, steps=2)
    train(config, tmp_path / "first")
    config, params, _ = load_trained(tmp_path / "first")
    for solver in ("ddim", "ddpm"):
        sampling = dataclasses.replace(config.sampling, solver=solver, clip=True)
        images = [
            generate_images(
                Sampler(config, params, TOKENIZER), [["draw a one"]], sampling=sampling, seed=s
            )
            for s in (0, 0, 1)
        ]
        assert images[0].shape == (1, 8, 8, 1) and np.isfinite(images[0]).all()
        np.testing.assert_array_equal(images[0], images[1])
        assert (images[0] != images[2]).any()
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    again = change(**DDPM, steps=1, init_from=str(tmp_path / "first"), optimizer=still)
    train(again, tmp_path / "second")
    started = load_trained(tmp_path / "second")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), started, params)
    with pytest.raises(InputError, match="holds another model: predict_variance"):
        train(change(steps=1, init_from=str(tmp_path / "first")), tmp_path / "third")


def test_drawn_steps_are_whole_and_even(change):
    config = change(**DDPM)
    batch = next(Batches(config, TOKENIZER).iterator)
    keys = [jax.random.split(jax.random.key(i)) for i in range(300)]
    times = [draw_noise(*pair, batch, config).times for pair in keys]
    denoised = np.asarray(times[0]) > 0
    drawn = 1000 * np.stack(times)[:, denoised].astype(np.float64)
    np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-3)
    assert abs(drawn.mean() - 499.5) < 5 * 1000 / 12**0.5 / drawn.size**0.5
    assert drawn.max() < 1000


def test_step_zero_is_noised_and_counted(change):
    """Its t is that of a clean image: what tells them apart is `denoise`."""
    config = change(**DDPM)
    params = monoformer.init(config.model, jax.random.key(0))
    batch = next(Batches(config, TOKENIZER).iterator)
    noise = draw_noise(*jax.random.split(jax.random.key(0)), batch, config)
    whole = loss_normalizers(batch, noise)
    zero = noise.replace(times=jax.numpy.zeros_like(noise.times))
    assert loss_normalizers(batch, zero) == whole and whole.images > 1
    fn = jax.jit(lambda noise: loss_fn(params, batch, noise, whole, config)[1]["image_loss"])
    other = zero.replace(noise=-zero.noise)
    assert fn(zero) > 0 and fn(zero) != fn(other)
    assert ddpm.step_to_t(0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("original", [
    OriginalConfig(time_conditioning="modulation"),
    OriginalConfig(image_head="add", position_embedding="every_layer"),
    OriginalConfig(context_images="causal", bidirectional_images=False, position_embedding="none"),
])  # fmt: skip
def test_every_variant_trains_and_paints_what_it_was_taught(change, original):
    """The cached sampler evaluates the same function as the training pass, in every variant."""
    config = change(
        model={"original": original}, sampling={"solver": "euler", "steps": 1, "guidance": 1.0}
    )
    params = monoformer.init(config.model, jax.random.key(0))
    batch = next(Batches(config, TOKENIZER).iterator)
    noise = draw_noise(*jax.random.split(jax.random.key(0)), batch, config)
    loss, _ = jax.jit(lambda p: loss_fn(p, batch, noise, loss_normalizers(batch, noise), config))(
        params
    )
    assert np.isfinite(loss)

    painted = generate_images(
        Sampler(config, params, TOKENIZER), [["draw a one"]], sampling=config.sampling, seed=3
    )
    start = jax.random.normal(jax.random.fold_in(jax.random.key(3), 0), (16, 4))
    document = build_document(
        ["draw a one", Image(np.zeros((8, 8, 1)), True)], TOKENIZER, config.layout
    )
    n = len(document["tokens"])
    row = {name: stream[None] for name, stream in document.items()}
    row["segment_ids"] = np.ones((1, n), np.int32)
    row["positions"] = np.arange(n, dtype=np.int32)[None]
    row["image_ids"] = (row["token_types"] > 1).astype(np.int32)
    row["patches"][row["token_types"] == 3] = start
    bound, times = monoformer.bind(config.model, params), np.ones((1, 1), np.float32)
    mask = monoformer.attention_mask(config.model, row)
    hidden, _ = bound(row, times, mask)
    velocity = output_of(bound, hidden, row["image_ids"], times)[row["token_types"] == 3]
    want = unpatchify(np.asarray(start - velocity), 8, 8, 2)
    np.testing.assert_allclose(painted[0], want, atol=1e-4)


def test_features_of_another_width_are_refused(change):
    model = change(model={"feature_dim": 5}).model
    document = build_document([Features(np.ones((3, 5))), "a"], TOKENIZER, model.layout)
    assert document["features"].sum() == 15 and not document["denoise"].any()
    with pytest.raises(ValueError, match=r"features \(3, 4\) are not \[n, 5\]"):
        build_document([Features(np.ones((3, 4)))], TOKENIZER, model.layout)
    with pytest.raises(ValueError, match="with a vision encoder"):
        build_document([Image(np.zeros((8, 8, 1)), denoise=False)], TOKENIZER, model.layout)


def test_a_solver_of_the_other_objective_is_refused(change):
    with pytest.raises(InputError, match=r"sampling\.solver='heun' does not sample"):
        make_config(change(objective={"kind": "ddpm"}).to_dict())
