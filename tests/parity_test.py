"""Parity of the transformer with recorded outputs of the original, case by case.

MONOFORMER_FIXTURES names another folder of such folders; tests/data/reference is the default.
"""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import cases, close, label
from parity_rows import build, forward, pictures

from monoformer_jax.config import Config, DataConfig, LossConfig, ObjectiveConfig, SamplingConfig
from monoformer_jax.diffusion import ddpm
from monoformer_jax.models import monoformer
from monoformer_jax.pretrained import monoformer as source
from monoformer_jax.pretrained.folder import open_weights
from monoformer_jax.training.losses import loss_fn, totals

# The recorded variants of a case are the same inputs under another config.
VARIANTS = {
    "_causal": {"bidirectional_images": False},
    "_nopos": {"position_embedding": "none"},
    "_pos_each_layer": {"position_embedding": "every_layer"},
}


def load(folder):
    """ModelConfig in float32, and the parameters."""
    features = source.feature_dim(open_weights(folder.path))
    model = source.read_config(folder.config, folder.path, features)
    model = dataclasses.replace(model, dtype="float32", remat="none")
    target = jax.eval_shape(lambda: monoformer.init(model, jax.random.key(0)))
    return model, folder.params(source.table(model), target, source.IGNORED)


def inputs_of(folder, case):
    """The case whose inputs it uses, and what it changes in the config."""
    for suffix, changes in VARIANTS.items():
        if case.endswith(suffix):
            base = case.removesuffix(suffix)
            recorded = folder.cases[case]
            return (recorded if "input_ids" in recorded else folder.cases[base]), changes
    return folder.cases[case], {}


def run_config(folder, model, images=1, **groups):
    """A Config around the model for the original's training objective."""
    length = folder.config["tokenizer_max_length"]
    return Config(
        model=model,
        objective=ObjectiveConfig(kind="ddpm"),
        loss=LossConfig(text_weight=0.01, image_weight=1.0, text_beside_images=False),
        data=DataConfig(row_length=length, image_size=folder.config["image_size"] // 8),
        sampling=SamplingConfig(solver="ddpm", guidance_channels="first_three"),
        **groups,
    )


@pytest.mark.parametrize("folder, case", cases("monoformer", "lm_loss_raw", "total"), ids=label)
def test_training_case(folder, case):
    recorded, (inputs, changes) = folder.cases[case], inputs_of(folder, case)
    model, params = load(folder)
    model = dataclasses.replace(model, **changes)
    rows = build(folder, inputs, model)
    bound = monoformer.bind(model, params)
    side = inputs["x_t"].shape[-1]
    assert rows.painted == recorded["x_indices"].tolist()

    noise, schedule = rows.noise.noise, ddpm.make_schedule()
    denoise = rows.batch["denoise"][..., None]
    step = inputs["t"][:, None, None]
    clean = rows.batch["patches"]
    seen = np.where(denoise, ddpm.add_noise(clean, noise, step, schedule), clean)
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
    close(text, recorded["lm_loss_raw"])
    total = 0.01 * text
    if rows.painted:
        close(pictures(output, rows, model, side), recorded["x_out"])
        predicted, variance = monoformer.split_output(output, model)
        squared, bound_term = ddpm.losses(clean, noise, predicted, variance, step, schedule)
        for name, values in (("mse", squared), ("vb", bound_term)):
            got = pictures(values, rows, model, side).mean((1, 2, 3))
            close(got, recorded[name])
        total += recorded["loss"].mean()
    close(total, recorded["total"])
    if not rows.lost_positions:  # where images are cut, which the original does and we never do
        config = run_config(folder, model)
        fn = jax.jit(lambda *arguments: loss_fn(*arguments, config))
        total, parts = fn(params, rows.batch, rows.noise, totals(rows.batch, rows.noise))
        close(total, recorded["total"])
        close(parts["text_loss"], recorded["lm_loss_raw"])
        if rows.painted:
            close(parts["image_loss"], recorded["loss"].mean())
