"""Parity of the autoencoder, the CLIP tower and the diffusion tables with recorded outputs."""

import json
import math

import jax
import numpy as np
import PIL.Image
import pytest
from fixtures import FOLDERS, cases, channels_last, close, label, sections_of

from monoformer_jax.diffusion import ddpm
from monoformer_jax.errors import InputError
from monoformer_jax.nn import autoencoder, clip
from monoformer_jax.pretrained import clip as clip_source
from monoformer_jax.pretrained import sd_vae
from monoformer_jax.pretrained.table import Tensor, by_path, open_tree, read_tree, write_tensors


def shapes_of(model, config):
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def bound(folder, model, source):
    config = source.read_config(folder.config)
    ignored = getattr(source, "IGNORED", "")
    params = folder.params(source.table(config), shapes_of(model, config), ignored)
    return model.bind(config, params)


@pytest.mark.parametrize("folder, case", cases("autoencoder"), ids=label)
def test_autoencoder(folder, case):
    recorded = {name: channels_last(array) for name, array in folder.cases[case].items()}
    vae = bound(folder, autoencoder, sd_vae)
    moments = jax.jit(vae.encode)(recorded["image"])
    close(vae.quantize(vae.encoder(recorded["image"])), recorded["moments"], 1e-4)
    close(moments.mean, recorded["mean"], 1e-4)
    close(moments.log_variance, recorded["logvar"], 1e-4)
    close(moments.sample(recorded["eps"]), recorded["z"], 1e-4)
    latents = vae.latents(moments, recorded["eps"])
    close(latents, recorded["latents"], 1e-4)
    close(jax.jit(vae.decode)(recorded["latents"]), recorded["decoded"], 1e-4)
    assert recorded["image"].shape[1] == vae.config.factor * latents.shape[1]


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.kind == "shapes"], ids=label)
def test_autoencoder_of_the_published_size(folder):
    """Names and shapes both ways, without allocating it."""
    recorded = json.loads((folder.path / "param_shapes.json").read_text())
    config = sd_vae.read_config(recorded["config"])
    shapes = shapes_of(autoencoder, config)
    written = write_tensors(sd_vae.table(config), shapes, np.dtype(np.float32))
    assert {k: list(v.shape) for k, v in written.items()} == recorded["shapes"]
    assert sum(math.prod(v.shape) for v in by_path(shapes).values()) == recorded["n_params"]
    assert config == sd_vae.read_config(sd_vae.write_config(config))


def test_the_default_autoencoder_is_the_published_one():
    shapes = by_path(shapes_of(autoencoder, autoencoder.AutoencoderConfig()))
    assert len(shapes) == 248
    assert sum(math.prod(v.shape) for v in shapes.values()) == 83_653_863


def test_latents_are_normalized_per_channel():
    """As diffusers does: (latent - mean) * scaling_factor / std; shift_factor is for every channel."""
    plain = sd_vae.write_config(autoencoder.AutoencoderConfig())
    assert sd_vae.read_config(plain) == autoencoder.AutoencoderConfig()
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.5]
    latents = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    for values, want in (
        ({"latents_mean": mean, "latents_std": std}, (latents - mean) * 0.18215 / std),
        ({"shift_factor": 0.1}, (latents - 0.1) * 0.18215),
    ):
        c = sd_vae.read_config(plain | values)
        assert sd_vae.read_config(sd_vae.write_config(c)) == c
        np.testing.assert_allclose(c.normalize(latents), want, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(c.denormalize(c.normalize(latents)), latents, atol=1e-6)
    with pytest.raises(InputError, match="latent_std has 2 values for 4 channels"):
        sd_vae.read_config(plain | {"latents_std": [1.0, 2.0]})


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.kind == "vae"], ids=label)
def test_old_names_of_the_autoencoder(folder):
    """The attention's names in the published file, older than those of the recorded one."""
    config = sd_vae.read_config(folder.config)
    table, target = sd_vae.table(config), shapes_of(autoencoder, config)
    params = folder.params(table, target)
    older = {e.name: e.alias for e in table if e.alias}
    assert len(older) == 16
    theirs = write_tensors(table, params, np.dtype(np.float32))
    renamed = {older.get(name, name): tensor for name, tensor in theirs.items()}
    again = read_tree(open_tree(table, renamed, target))
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("folder, case", cases("tower", "pixels"), ids=label)
def test_clip(folder, case):
    recorded = folder.cases[case]
    pixels = channels_last(recorded["pixel_values"])
    tower = bound(folder, clip, clip_source)
    if "features" in recorded:
        close(jax.jit(tower.features)(pixels), recorded["features"], 1e-4)
        states = jax.jit(tower.states)(pixels)
        for i in range(len(states)):
            if f"hidden_{i}" in recorded:
                close(states[i], recorded[f"hidden_{i}"], 1e-4)
        close(states[-1], recorded["last_hidden_state"], 1e-4)
        close(tower.norm_out(states[-1][:, 0]), recorded["pooler_output"], 1e-4)
    else:
        image = PIL.Image.fromarray(recorded["image_u8"])
        close(clip.preprocess(image, tower.config)[None], pixels, 2e-5)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.kind == "clip"], ids=label)
def test_clip_tower_in_a_complete_clip_model_and_back(folder):
    config = clip_source.read_config(folder.config)
    assert clip_source.read_config({"vision_config": clip_source.write_config(config)}) == config
    table, target = clip_source.table(config), shapes_of(clip, config)
    params = folder.params(table, target)
    theirs = write_tensors(table, params, np.dtype(np.float32))
    extra = Tensor((2,), np.dtype(np.float32), lambda: np.zeros(2))
    whole = theirs | dict.fromkeys(("text_model.a.weight", "logit_scale",
                                    "vision_model.embeddings.position_ids"), extra)  # fmt: skip
    again = read_tree(open_tree(table, whole, target, ignored=clip_source.IGNORED))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_default_clip_is_vit_l_14():
    """303,179,776 parameters of the published vision tower, 256 patches."""
    shapes = by_path(shapes_of(clip, clip.ClipConfig()))
    assert sum(math.prod(v.shape) for v in shapes.values()) == 303_179_776
    assert clip.ClipConfig().patches == 256


@pytest.mark.parametrize("folder, case", cases("tables"), ids=label)
def test_tables_of_the_chain(folder, case):
    recorded = folder.cases[case]
    schedule = ddpm.make_schedule(sections_of(recorded["timestep_map"]))
    assert len(recorded) >= 10
    for name, want in recorded.items():
        got = getattr(schedule, name)
        assert got.dtype == want.dtype, name
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("folder, case", cases("losses"), ids=label)
def test_losses_and_the_reverse_gaussian(folder, case):
    recorded = {k: channels_last(v) if v.ndim == 4 else v for k, v in folder.cases[case].items()}
    x, noise, step = recorded["x_start"], recorded["noise"], recorded["t"][:, None, None, None]
    predicted, variance = np.split(recorded["model_output"], 2, axis=-1)
    schedule = ddpm.make_schedule()
    close(ddpm.q_sample(x, noise, step, schedule), recorded["x_t"])
    squared, bound = ddpm.hybrid_loss_terms(x, noise, predicted, variance, step, schedule)
    close(squared.mean((1, 2, 3)), recorded["mse"])
    close(bound.mean((1, 2, 3)), recorded["vb"])
    close((squared + bound).mean((1, 2, 3)), recorded["loss"])
    got = ddpm.p_mean_variance(recorded["x_t"], predicted, variance, step, schedule)
    # At high noise, the clean image and the mean are small differences of large numbers.
    for name, ours in (("p_mean", got.mean), ("pred_xstart", got.clean)):
        scale = max(1.0, np.abs(recorded[name]).max())
        close(ours / scale, recorded[name] / scale)
    close(got.log_variance, recorded["p_log_variance"])
