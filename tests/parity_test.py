"""Parity of the transformer with recorded outputs of the original, case by case.

MONOFORMER_FIXTURES names another folder of such folders; tests/data/reference is the default.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import REFERENCE
from fixtures import CHECKS, FOLDERS, cases, close, label
from parity_model import first_inputs, inputs_of, load, run_config, vary
from parity_rows import build, forward, pictures

from monoformer_jax.attention import dense_mask
from monoformer_jax.config import OptimizerConfig
from monoformer_jax.diffusion import ddpm
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import MonoFormerConfig, OriginalConfig
from monoformer_jax.pretrained import monoformer as source
from monoformer_jax.pretrained.conversion import find_source, open_source
from monoformer_jax.pretrained.folder import open_safetensors, write_safetensors
from monoformer_jax.pretrained.model import open_pretrained
from monoformer_jax.pretrained.table import Tensor, read_tree, write_tensors
from monoformer_jax.training.losses import loss_fn, loss_normalizers
from monoformer_jax.training.optimizer import make_optimizer
from monoformer_jax.training.state import TrainState, apply_step


def test_a_folder_with_a_vision_tower_and_a_newer_config(tmp_path):
    """The original's files repeat the frozen tower; transformers 5 has another key for RoPE."""
    folder = REFERENCE / "tiny_a_mm"
    config = json.loads((folder / "config.json").read_text())
    theta, _ = config.pop("rope_theta"), config.pop("rope_scaling")
    rope = {"rope_type": "default", "rope_theta": 2 * theta}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    tensors = open_safetensors(folder / "weights.safetensors")
    extra = Tensor((2,), np.dtype(np.float32), lambda: np.zeros(2, np.float32))
    tower = {f"vision_encoder.vision_tower.vision_model.{name}": extra for name in ("a", "b")}
    write_safetensors(tmp_path / "model.safetensors", tensors | tower)
    weights = open_source(find_source(str(tmp_path)))
    assert weights.left_out == tuple(tower)
    assert weights.config.model.rope_theta == 2 * theta
    read, whole = read_tree(weights.ema), read_tree(open_pretrained(folder).open())
    jax.tree.map(np.testing.assert_array_equal, read, whole)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "yarn"}})
    )
    with pytest.raises(InputError, match="rope_parameters of type 'yarn' are not supported"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("features", [0, 12])
def test_an_exported_config_is_one_that_the_original_can_build(features):
    """It needs the keys of its vision encoder, and has no head_dim of its own."""
    c = MonoFormerConfig(feature_dim=features, original=OriginalConfig(context_images="causal"))
    values = source.write_config(c, 8, 64)
    assert (
        {"vision_encoder", "vision_encoder_path", "vision_encoder_args"} <= values.keys()
    ) == bool(features)
    assert source.read_config(values, features=features) == dataclasses.replace(
        c, dtype=source.read_config(values).dtype
    )
    with pytest.raises(InputError, match=r"model\.head_dim=8 with embed_dim"):
        source.write_config(dataclasses.replace(c, head_dim=8), 8, 64)


def test_every_recorded_case_is_checked():
    assert FOLDERS, "no folder holds recorded outputs"
    checked = [(folder.path, case) for folder, case in cases(*CHECKS)]
    for folder in FOLDERS:
        if folder.kind != "shapes":
            assert folder.cases
            assert [case for case in folder.cases if (folder.path, case) not in checked] == []


@pytest.mark.slow
@pytest.mark.parametrize("folder, case", cases("training"), ids=label)
def test_training_case(folder, case):
    recorded, (inputs, changes) = folder.cases[case], inputs_of(folder, case)
    model, params = load(folder)
    model = vary(model, changes)
    rows = build(folder, inputs, model)
    bound = monoformer.bind(model, params)
    side = inputs["x_t"].shape[-1]
    assert rows.painted == recorded["x_indices"].tolist()

    noise, schedule = rows.noise.noise, ddpm.make_schedule()
    denoise = rows.batch["denoise"][..., None]
    step = inputs["t"][:, None, None]
    clean = rows.batch["patches"]
    seen = np.where(denoise, ddpm.q_sample(clean, noise, step, schedule), clean)
    if rows.painted:
        close(pictures(seen, rows, model, side), inputs["x_t"][rows.painted])
    logits, output = jax.jit(lambda x: forward(bound, rows, x))(seen)
    if "logits" in recorded:
        V = model.vocab_size
        close(logits[..., :V][rows.valid], recorded["logits"][rows.valid])
    nll = -jax.nn.log_softmax(logits)[..., : model.vocab_size]
    nll = np.take_along_axis(np.asarray(nll), rows.batch["targets"][..., None], -1)[..., 0]
    weights = rows.batch["target_weights"]
    text = (nll * weights).sum() / max(weights.sum(), 1)
    want_text, want_total = recorded["lm_loss_raw"], recorded["total"]
    if np.isnan(want_text):  # the original's mean over no labels, which is 0 here
        assert not weights.any()
        want_text, want_total = 0.0, recorded["loss"].mean() if rows.painted else 0.0
    close(text, want_text)
    total = 0.01 * text
    if rows.painted:
        close(pictures(output, rows, model, side), recorded["x_out"])
        predicted, variance = output, None
        if model.predict_variance:
            predicted, variance = np.split(output, 2, axis=-1)
        squared, bound_term = ddpm.hybrid_loss_terms(
            clean, noise, predicted, variance, step, schedule
        )
        for name, values in (("mse", squared), ("vb", bound_term)):
            if name in recorded:  # there is no bound without learned sigma
                close(pictures(values, rows, model, side).mean((1, 2, 3)), recorded[name])
        total += recorded["loss"].mean()
    close(total, want_total)
    if not rows.lost_positions:  # otherwise images are truncated, as only the original does
        config = run_config(folder, model)
        fn = jax.jit(lambda *arguments: loss_fn(*arguments, config))
        total, parts = fn(params, rows.batch, rows.noise, loss_normalizers(rows.batch, rows.noise))
        close(total, want_total)
        close(parts["text_loss"], want_text)
        if rows.painted:
            close(parts["image_loss"], recorded["loss"].mean())


def relative(got, want, tolerance=1e-4):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = max(np.abs(want).max(), 1e-12)
    close(got / scale, want / scale, tolerance)


def their_names(folder, model, tree):
    """Arrays of a parameter tree with the original's names."""
    tensors = write_tensors(source.table(model), tree, np.dtype(np.float32))
    return {name: tensor.load() for name, tensor in tensors.items()}


@pytest.mark.parametrize("folder, case", cases("gradients"), ids=label)
def test_gradients(folder, case):
    recorded, (model, params) = folder.cases[case], load(folder)
    rows, config = build(folder, recorded, model), run_config(folder, model)
    assert not rows.lost_positions, "gradients are compared where every image is whole"

    def loss(params):
        return loss_fn(
            params, rows.batch, rows.noise, loss_normalizers(rows.batch, rows.noise), config
        )[0]

    grads = their_names(folder, model, jax.jit(jax.grad(loss))(params))
    norms = {k.removeprefix("gradnorm/"): v for k, v in recorded.items() if "gradnorm/" in k}
    assert norms.keys() <= grads.keys()
    for name, grad in grads.items():  # parameters that the case does not use have no gradient
        relative(np.linalg.norm(grad.astype(np.float64)), norms.get(name, 0.0))
    file = folder.path / f"grads_{case}.safetensors"
    if file.is_file():
        for name, tensor in open_safetensors(file).items():
            relative(grads[name], tensor.load())


@pytest.mark.slow
@pytest.mark.parametrize("folder, case", cases("optimizer"), ids=label)
def test_training_steps(folder, case):
    recorded, (model, params) = folder.cases[case], load(folder)
    rows = build(folder, first_inputs(folder, recorded["trace"][0][0]), model)
    optimizer = OptimizerConfig(
        learning_rate=float(recorded["lr"]), schedule="constant", warmup_steps=0, b2=0.999,
        weight_decay=float(recorded["weight_decay"]), decay_everything=True,
        clip_norm=float(recorded["clip"]), ema_decay=float(recorded["ema_decay"]), ema_ramp=False,
    )  # fmt: skip
    config = run_config(folder, model, optimizer=optimizer)
    first = make_optimizer(optimizer, config.steps, monoformer.logical_axes(model)).init(params)
    state = TrainState(np.int32(0), params, params, first)
    step = jax.jit(lambda state: apply_step(state, rows.batch, rows.noise, config))
    for want in recorded["trace"]:
        state, metrics = step(state)
        values = metrics.compute()
        values["text_loss"] *= config.loss.text_weight
        got = [values[k] for k in ("loss", "image_loss", "text_loss", "grad_norm")]
        np.testing.assert_allclose(got, want, rtol=1e-4)
    for group, tree in (("param/", state.params), ("ema/", state.ema)):
        ours = their_names(folder, model, tree)
        named = {k.removeprefix(group): v for k, v in recorded.items() if k.startswith(group)}
        assert named
        for name, want in named.items():
            relative(ours[name], want)


@pytest.mark.parametrize("folder, case", cases("mask"), ids=label)
def test_mask(folder, case):
    recorded, (model, _) = folder.cases[case], load(folder)
    side, ids = folder.config["image_size"] // 8, recorded["input_ids"]
    images = (ids == folder.config["special_tokens"]["image"]).sum(1)
    empty = np.zeros((len(ids), model.channels, side, side), np.float32)
    inputs = {
        "input_ids": ids,
        "attention_mask": recorded["attention_mask"],
        "labels": np.full(ids.shape, -100),
        "flags": np.where(np.arange(images.max()) < images[:, None], 0, -1),
        "t": np.zeros(len(ids), np.int64),
        "x_start": empty,
        "noise": empty,
        "x_t": empty,
    }
    rows = build(folder, inputs, model)
    length = rows.valid.shape[1]  # that of the given rows, and of their images
    allowed = dense_mask(monoformer.attention_mask(model, rows.batch), length)
    assert recorded["allowed"][rows.valid].any()
    np.testing.assert_array_equal(allowed[rows.valid], recorded["allowed"][rows.valid])
