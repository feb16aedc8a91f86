"""The modern recipe beside the original's: its values, and what each of its options computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from monoformer_jax.batch import PATCH
from monoformer_jax.cli import load_config
from monoformer_jax.config import ObjectiveConfig, SamplingConfig
from monoformer_jax.data.documents import Image, Prompt, draw_clean, draw_order
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.diffusion.ddpm import make_schedule
from monoformer_jax.diffusion.objectives import get_objective
from monoformer_jax.diffusion.rectified_flow import shift_times
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.pretrained.monoformer import write_config
from monoformer_jax.sampling.image import denoise_settings, fid_sampling
from monoformer_jax.training.losses import continued_images, draw_noise, loss_fn, loss_normalizers
from monoformer_jax.training.optimizer import make_optimizer
from monoformer_jax.training.text_loss import text_loss


@pytest.fixture(scope="module")
def inputs(config):
    batch = next(Batches(config, ByteTokenizer()).iterator)
    return batch, draw_noise(*jax.random.split(jax.random.key(1)), batch, config)


@pytest.mark.parametrize("name", ["imagenet256", "journeydb_ultrachat", "llava_journeydb"])
def test_modern_is_a_recipe_beside_the_original_s(name):
    file = f"{ROOT}/configs/{name}.py"
    original, modern = load_config(file, []), load_config(f"{file}:modern", [])
    assert modern == load_config(f"{file}:v5e-64,modern", [])
    c = modern.optimizer
    assert (c.b2, c.clip_norm, c.warmup_steps, c.weight_decay) == (0.95, 1.0, 4000, 0.1)
    assert modern.model.zero_image_head and not modern.model.qk_norm and not modern.loss.z_loss
    assert modern.objective.shift == 1 == modern.image_sampling().shift
    scored = fid_sampling(modern.sampling)
    assert (modern.sampling.guidance, scored.guidance) == (4.0, 1.5)
    assert (scored.guidance_low, scored.guidance_high) == (0.0, 0.7)
    for group in ("data", "loss", "mesh", "steps", "batch_size"):
        assert getattr(original, group) == getattr(modern, group)
    load_config(f"{file}:tiny,modern", [])
    with pytest.raises(InputError, match="there is no recipe 'old'; there is modern"):
        load_config(f"{file}:tiny,old", [])


def test_images_to_score_have_their_own_guidance():
    looks = SamplingConfig(guidance=4.0, guidance_low=0.4)
    assert fid_sampling(looks) == looks
    scored = fid_sampling(dataclasses.replace(looks, fid_guidance=1.5, fid_guidance_high=0.7))
    assert (scored.guidance, scored.guidance_low, scored.guidance_high) == (1.5, 0.0, 0.7)


def test_sampling_has_the_shift_of_training(change):
    config = change(objective={"shift": 3.0})
    grid = denoise_settings(config.image_sampling(SamplingConfig("euler", steps=4)))[0]
    np.testing.assert_allclose(grid.times[:5], shift_times(np.linspace(1, 0, 5), 3.0), rtol=1e-6)
    assert config.image_sampling(SamplingConfig(shift=2.0)).shift == 2
    with pytest.raises(InputError, match=r"shift=0.0 must be above 0"):
        denoise_settings(SamplingConfig())


def test_z_loss_is_the_squared_log_partition_of_each_token():
    rng, real, width = np.random.default_rng(0), 200, 256
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((3, 20, 16), (16, width)))
    targets = rng.integers(0, real, (3, 20))
    weights = rng.uniform(0.5, 2, (3, 20)) * (rng.uniform(size=(3, 20)) < 0.4)

    def whole(hidden, head):
        logits = jnp.where(jnp.arange(width) < real, hidden @ head, jnp.finfo(jnp.float32).min)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * (loss + 0.01 * jax.nn.logsumexp(logits, -1) ** 2))

    def chunked(hidden, head):
        return text_loss(hidden, head, targets, weights, real, 0.01, 7 * width)

    want, want_grads = jax.value_and_grad(whole, (0, 1))(hidden, head)
    got, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


def test_qk_norm_makes_attention_independent_of_the_size_of_queries_and_keys(change, inputs):
    batch, noise = inputs
    c = change(model={"qk_norm": True}).model
    params = monoformer.init(c, jax.random.key(0))
    attention = params["decoder"]["layers"]["attention"]
    assert attention["q_norm"]["scale"].shape == (c.num_layers, c.head_dim)
    forward = jax.jit(lambda p, c: monoformer.forward(c, p, batch, noise.noise, noise.times),
                      static_argnums=1)  # fmt: skip
    before = forward(params, c).text_hidden
    for name in ("q", "k"):
        attention[name] = 10 * attention[name]
    np.testing.assert_allclose(forward(params, c).text_hidden, before, atol=1e-3)
    for name in ("q_norm", "k_norm"):
        attention[name]["scale"] = 0 * attention[name]["scale"]
    assert (
        np.abs(forward(params, c).text_hidden - before).max() > 0.01
    )  # now all keys weigh the same
    with pytest.raises(InputError, match=r"the original does not support model\.qk_norm=True"):
        write_config(c, 8, 64)


def test_a_zero_image_head_predicts_zero_and_learns(change, config, inputs):
    batch, noise = inputs
    zero = change(model={"zero_image_head": True})
    params, other = (monoformer.init(c.model, jax.random.key(0)) for c in (zero, config))
    assert not np.any(params["image_head"]["out"]["kernel"])
    params["image_head"]["out"] = other["image_head"]["out"]
    jax.tree.map(
        np.testing.assert_array_equal, params, other
    )  # nothing else is initialised otherwise
    params = monoformer.init(zero.model, jax.random.key(0))

    def image_loss(params):
        return loss_fn(params, batch, noise, loss_normalizers(batch, noise), zero)[1]["image_loss"]

    loss, grads = jax.jit(jax.value_and_grad(image_loss))(params)
    patch = batch["denoise"] & (batch["token_types"] == 3)
    np.testing.assert_allclose(
        loss, np.mean((noise.noise - batch["patches"])[patch] ** 2), rtol=1e-5
    )
    assert np.any(grads["image_head"]["out"]["kernel"])


def test_text_weight_does_not_slow_what_the_text_loss_alone_trains(change, inputs):
    """Adam's step has the size of the learning rate: the weight turns the step of the decoder."""
    batch, noise = inputs
    whole = loss_normalizers(batch, noise)
    config = change(
        optimizer={"warmup_steps": 0, "schedule": "constant", "weight_decay": 0, "clip_norm": 1e6}
    )
    params = monoformer.init(config.model, jax.random.key(0))

    def losses(params):
        parts = loss_fn(params, batch, noise, whole, config)[1]
        return jnp.stack([parts["text_loss"], parts["image_loss"]])

    both = jax.jit(jax.jacrev(losses))(params)
    optimizer = make_optimizer(config.optimizer, 1, monoformer.logical_axes(config.model))

    def step(weight):
        grads = jax.tree.map(lambda g: weight * g[0] + g[1], both)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    moved = {weight: jax.tree.map(np.ravel, step(weight)) for weight in (1.0, 0.01)}

    def compare(pick):
        a, b = (pick(moved[weight]) for weight in (1.0, 0.01))
        norms = np.linalg.norm(a), np.linalg.norm(b)
        return norms[1] / norms[0], a @ b / norms[0] / norms[1]

    size, cosine = compare(lambda tree: tree["text_head"])
    assert 0.9 < size < 1.01 and cosine > 0.95
    size, cosine = compare(lambda tree: tree["image_head"]["out"]["kernel"])
    assert size == pytest.approx(1, abs=1e-3) and cosine > 0.999
    size, cosine = compare(lambda tree: tree["decoder"]["layers"]["mlp"]["up"])
    assert 0.9 < size < 1.1 and cosine < 0.9


TRANSFUSION = f"{ROOT}/configs/transfusion_7b.py"


@pytest.mark.parametrize("size", ["0.16b", "0.37b", "0.76b", "1.4b", "7b"])
def test_the_sizes_of_transfusion_have_the_parameters_of_their_names(size):
    """Without the U-Net, which has 0.27 B in the paper."""
    config = load_config(f"{TRANSFUSION}:{size}", [])
    shapes = jax.eval_shape(lambda: monoformer.init(config.model, jax.random.key(0)))
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    named = 1e9 * float(size[:-1])
    text = count["decoder"] + count["token_embedding"] + count["text_head"]
    assert abs(text - named) < 0.05 * named
    codec = count["patch_embedding"] + count["image_head"]
    assert 0.25e9 < codec < 0.35e9
    tokens = config.batch_size * config.data.max_seq_len * config.steps
    assert abs(tokens - (2e12 if size == "7b" else 0.5e12)) < 0.01 * tokens


def test_the_recipe_of_transfusion():
    config = load_config(f"{TRANSFUSION}:tiny", [])
    assert (config.loss.image_weight, config.loss.text_weight) == (5, 1)
    assert config.image_sampling().beta_schedule == "cosine"
    flow = ["--config.objective.kind=rectified_flow", "--config.objective.beta_schedule=linear",
            "--config.sampling.solver=heun", "--config.sampling.steps=50"]  # fmt: skip
    clean = ["--config.objective.noise_limit=1", "--config.data.noised_copies=True",
             "--config.data.clean_images=0.1"]  # fmt: skip
    linear = ["--config.model.patch_codec=linear", "--config.model.max_patches=0"]
    load_config(f"{TRANSFUSION}:tiny", flow + clean + linear)
    for overrides in (
        flow[:1] + flow[2:],
        clean[1:],
        linear[:1],
    ):  # one half of a choice is refused
        with pytest.raises(InputError):
            load_config(f"{TRANSFUSION}:tiny", overrides)
    with pytest.raises(InputError, match="there is no size '3b'; there are 7b, "):
        load_config(f"{TRANSFUSION}:3b", [])
    batch = next(Batches(config, ByteTokenizer()).iterator)
    noise = draw_noise(*jax.random.split(jax.random.key(1)), batch, config)
    limited = continued_images(batch, config.max_images) & (noise.times > 0)
    assert limited.any() and (noise.times[limited] < 0.5).all() and (noise.times > 0.5).any()


def test_an_image_stands_before_its_caption_in_a_share_of_the_pairs():
    image = Image(np.zeros((4, 4, 1), np.float32), denoise=True)
    shown = dataclasses.replace(image, denoise=False)
    rng, pair, seen = np.random.default_rng(0), [Prompt(("a cat", "one cat")), image], []
    for _ in range(400):
        parts = draw_order(pair, rng, 0.25)
        assert len(parts) == 2 and any(part is image for part in parts)
        seen.append(parts[0] if isinstance(parts[0], Prompt) else parts[1])
    behind = [part for part in seen if isinstance(part, str)]
    assert set(behind) == {"a cat", "one cat"} and 70 < len(behind) < 130
    for other in (["text"], [shown, "what it shows"], [Prompt(("a",)), shown], [image, *pair]):
        assert draw_order(other, rng, 1.0) == other
    # No random number is drawn without it: other configs get the same batches.
    state = rng.bit_generator.state
    assert draw_order(pair, rng, 0.0) == pair and rng.bit_generator.state == state


def test_images_to_generate_are_clean_in_a_share_of_the_examples(change):
    image = Image(np.zeros((4, 4, 1), np.float32), denoise=True)
    pair, rng = [Prompt(("a cat",)), image, "text"], np.random.default_rng(0)
    drawn = [draw_clean(pair, rng, 0.25) for _ in range(400)]
    clean = [parts for parts in drawn if not parts[1].denoise]
    assert 70 < len(clean) < 130 and pair[1].denoise
    assert all(parts[::2] == pair[::2] and parts[1].pixels is image.pixels for parts in drawn)
    state = rng.bit_generator.state
    assert draw_clean(pair, rng, 0.0) == pair and rng.bit_generator.state == state

    config = change(data={"mixture": {"draw": 1.0}, "clean_images": 0.5})
    batch = next(Batches(config, ByteTokenizer()).iterator)
    patches = batch["token_types"] == PATCH
    assert 0.2 < batch["denoise"][patches].mean() < 0.8
    with pytest.raises(InputError, match=r"data\.clean_images needs a model that reads text"):
        load_config(f"{ROOT}/configs/digits_diffussm.py", ["--config.data.clean_images=0.1"])


def test_sampling_has_the_noise_schedule_of_training(change):
    config = change(objective={"kind": "ddpm", "beta_schedule": "cosine"},
                    sampling={"solver": "ddpm"})  # fmt: skip
    steps = SamplingConfig("ddim", steps=250)
    grid = denoise_settings(config.image_sampling(steps))[0]
    want = make_schedule(250, "cosine")
    np.testing.assert_array_equal(grid.schedule.alphas_cumprod[:250], want.alphas_cumprod)
    t = jnp.array([[[0.4]]])
    x = get_objective(config.objective).add_noise(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1)), t)
    share = np.cos((401 / 1000 + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    np.testing.assert_allclose(x.item(), share, rtol=1e-6)
    for wrong, message in (
        ({"beta_schedule": "cosine"}, r"beta_schedule='cosine' is for objective\.kind='ddpm'"),
        ({"kind": "ddpm", "beta_schedule": "square"}, "is none of linear, cosine"),
    ):
        with pytest.raises(InputError, match=message):
            get_objective(ObjectiveConfig(**wrong))
