"""Parity of sampling and writing with recorded outputs: the same cached code that users run."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import cases, channels_last, close, label
from parity_model import IdTokenizer, inputs_of, load, run_config

from monoformer_jax.batch import number_images, patchify, unpatchify
from monoformer_jax.data.documents import Features, build
from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.solvers import make_grid, solve
from monoformer_jax.generation.image import make_canvas, make_guidance, predictor
from monoformer_jax.generation.rows import prefill
from monoformer_jax.generation.streams import bucket, stack
from monoformer_jax.generation.text import generate_text
from monoformer_jax.models import monoformer


class Sampler:
    """The recorded prompts of a sampling case, ready to paint."""

    def __init__(self, folder, case):
        self.recorded, changes = inputs_of(folder, case)
        model, params = load(folder)
        self.model = dataclasses.replace(model, **changes)
        self.side = self.recorded["z"].shape[-1]
        self.n = len(self.recorded["z"]) // 2
        self.bound = monoformer.bind(self.model, params)
        tokenizer = IdTokenizer(folder.config)
        prompts = []
        for ids in self.recorded["input_ids"].tolist():
            image = ids.index(tokenizer.image_id)
            assert ids[0] == tokenizer.bos_id and ids[image - 1] == tokenizer.im_start_id
            text = " ".join(map(str, ids[1 : image - 1]))
            prompts.append([text] if text else [])
        self.config = run_config(folder, self.model)
        self.params, self.pad_id = params, tokenizer.pad_id
        self.prompts = [
            build(prompt, tokenizer, self.model, closing=[tokenizer.im_start_id])
            for prompt in prompts
        ]
        self.schedule = ddpm.make_schedule(len(self.recorded["timestep_map"]))

    def predictor(self, branches):
        """With two, the second half of the recorded prompts is what the first is guided against."""
        scale = float(self.recorded["cfg_scale"])
        sampling = dataclasses.replace(self.config.sampling, guidance=scale)
        pairs = zip(self.prompts[: self.n], self.prompts[self.n :])
        prompts = self.prompts if branches == 1 else [prompt for pair in pairs for prompt in pair]
        rows = prefill(self.params, prompts, self.pad_id, self.model, None)
        canvas = make_canvas(self.config, sampling, (self.side, self.side), branches)
        return predictor(self.bound, rows, canvas, make_guidance(sampling))

    def patches(self, x):
        """[n, C, h, w] -> [n, patches, P]."""
        p = self.model.patch_size
        return np.stack([patchify(image, p)[0] for image in channels_last(x)])

    def pictures(self, patches):
        images = unpatchify(np.asarray(patches), self.side, self.side, self.model.patch_size)
        return np.moveaxis(images, -1, -3)

    def output(self, predicted, variance):
        parts = [predicted] if variance is None else [predicted, variance]
        return np.concatenate([self.pictures(part) for part in parts], 1)

    def noise(self):
        return np.stack([self.patches(step) for step in self.recorded["noise"]])


@pytest.fixture(scope="module")
def sampler():
    made = {}

    def make(folder, case):
        if (folder.path, case) not in made:
            made[folder.path, case] = Sampler(folder, case)
        return made[folder.path, case]

    return make


SAMPLING = pytest.mark.parametrize("folder, case", cases("monoformer", "z", "fw_x_out"), ids=label)


@SAMPLING
def test_one_guided_evaluation(sampler, folder, case):
    s = sampler(folder, case)
    recorded = s.recorded
    t = ddpm.clock(recorded["fw_t"][0])
    assert (recorded["fw_t"] == recorded["fw_t"][0]).all()
    guided = jax.jit(lambda x: s.predictor(2)(x, t))(s.patches(recorded["z"][: s.n]))
    close(s.output(*guided), recorded["fw_x_out"][: s.n])
    plain = jax.jit(lambda x: s.predictor(1)(x, t))(s.patches(recorded["z"]))
    close(s.output(*plain), recorded["fw_x_out_nocfg"])


@SAMPLING
def test_sampling_loops(sampler, folder, case):
    """All steps with the recorded noise, to 1e-4 of the largest value."""
    s = sampler(folder, case)
    recorded, noise, start = s.recorded, s.noise(), s.patches(s.recorded["z"][: s.n])
    np.testing.assert_array_equal(s.schedule.timestep_map, recorded["timestep_map"])
    chains = {
        "final": ("ddpm", False),
        "final_clip": ("ddpm", True),
        "ddim_final": ("ddim", False),
    }
    grid = make_grid("ddpm", len(s.schedule))

    def run(x, solver, clip):
        draw = lambda i: jax.numpy.asarray(noise)[i]  # noqa: E731
        return solve(solver, s.predictor(2), x, grid, draw=draw, clip=clip)[0]

    checked = 0
    for name, (solver, clip) in chains.items():
        if name not in recorded:
            continue
        got = s.pictures(jax.jit(run, static_argnums=(1, 2))(start, solver, clip))
        want = recorded[name][: s.n]
        close(got / np.abs(want).max(), want / np.abs(want).max(), 1e-4)
        checked += 1
    assert checked > 1


@SAMPLING
def test_first_step(sampler, folder, case):
    s = sampler(folder, case)
    k = len(s.schedule) - 1
    start, draw = s.patches(s.recorded["z"][: s.n]), s.noise()[0]
    t = ddpm.clock(s.schedule.timestep_map[k])
    predicted, variance = jax.jit(lambda x: s.predictor(2)(x, t))(start)
    checked = 0
    for clip, names in ((False, ("sample_step0", "pred_xstart_step0")),
                        (True, ("sample_clip_step0",))):  # fmt: skip
        p = ddpm.reverse(start, predicted, variance, np.array(k), s.schedule, clip)
        drawn = p.mean + np.exp(0.5 * p.log_variance) * draw
        for name, value in zip(names, (drawn, p.clean)):
            if name in s.recorded:
                want = s.recorded[name][: s.n]
                close(s.pictures(value) / np.abs(want).max(), want / np.abs(want).max(), 1e-4)
                checked += 1
    assert checked


def stops(ids, tokenizer):
    """The ids before the first at which generation stops."""
    ends = [i for i, token in enumerate(ids) if token in (tokenizer.eos_id, tokenizer.im_start_id)]
    return ids[: ends[0]] if ends else ids


def uncached(model, params, streams):
    """Logits [B, L, V] of whole prompts."""
    bound = monoformer.bind(model, params)

    @jax.jit
    def run(streams):
        mask = monoformer.attention_mask(model, streams)
        hidden, _ = bound(streams, np.zeros((len(streams["tokens"]), 1)), mask)
        return bound.text_logits(hidden)

    return np.asarray(run(streams))[..., : model.vocab_size]


def recorded_features(folder):
    """Of the vision encoder's stand-in, for the cases that do not hold their own."""
    return next(a["vision_features"][0] for a in folder.cases.values() if "vision_features" in a)


@pytest.mark.parametrize("folder, case", cases("monoformer", "generated"), ids=label)
def test_text_token_for_token(folder, case):
    recorded, (model, params) = folder.cases[case], load(folder)
    tokenizer, config = IdTokenizer(folder.config), run_config(folder, model)
    ids = recorded["input_ids"][0].tolist()
    parts = [" ".join(map(str, ids[1:]))]
    if tokenizer.image_id in ids:
        assert ids[1:4] == [tokenizer.im_start_id, tokenizer.image_id, tokenizer.im_end_id]
        parts = [Features(recorded_features(folder)), " ".join(map(str, ids[4:]))]
    document = build(parts, tokenizer, model, closing=[])
    streams = stack([document], bucket(len(document["tokens"])), tokenizer.pad_id)
    streams["positions"] = np.arange(streams["tokens"].shape[1])[None]
    logits = uncached(model, params, streams)[streams["segment_ids"] > 0]
    close(logits, recorded["prefill_logits" if len(parts) > 1 else "logits"][0])
    generated = recorded["generated"][0].tolist()
    got = generate_text(config, params, tokenizer, [parts], max_tokens=len(generated))
    assert got[0].tokens == stops(generated, tokenizer)


@pytest.mark.parametrize("folder, case", cases("llama", "hidden_last", "logits"), ids=label)
def test_llama_layer_by_layer(folder, case):
    recorded = folder.cases[case]
    model, params = load(folder)
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    valid = mask.astype(bool)
    B, L = ids.shape
    streams = {
        "tokens": ids,
        "kinds": mask.astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.broadcast_to(np.arange(L), (B, L)),
        "image_ids": np.stack([number_images(row) for row in mask]),
        "denoise": np.zeros((B, L), bool),
        "patches": np.zeros((B, L, model.patch_dim), np.float32),
        "grid": np.zeros((B, L, 2), np.int32),
    }
    # The four tokens that ours has more change none of the others' logits.
    V = folder.config["vocab_size"]
    close(uncached(model, params, streams)[valid][:, :V], recorded["logits"][valid])
    bound = monoformer.bind(model, params)
    close(bound.embed(streams, np.zeros((B, 1)))[valid], recorded["hidden_0"][valid])
    ranges = monoformer.attention_mask(model, streams)
    hidden, _ = bound(streams, np.zeros((B, 1)), ranges)
    close(hidden[valid], recorded["hidden_last"][valid])
    for depth in range(1, model.num_layers):
        if f"hidden_{depth}" not in recorded:
            continue
        part = dataclasses.replace(model, num_layers=depth)
        layers = jax.tree.map(lambda x, n=depth: x[:n], params["decoder"]["layers"])
        shallow = params | {"decoder": params["decoder"] | {"layers": layers}}
        hidden, _ = monoformer.bind(part, shallow)(streams, np.zeros((B, 1)), ranges)
        # Ours ends with the final norm, which the recorded state in the middle has not seen.
        close(hidden[valid], bound.decoder.norm(recorded[f"hidden_{depth}"])[valid])


@pytest.mark.parametrize("folder, case", cases("llama", "prompt", "sequences"), ids=label)
def test_llama_token_for_token(folder, case):
    recorded = folder.cases[case]
    model, params = load(folder)
    tokenizer, config = IdTokenizer(folder.config), run_config(folder, model)
    prompt = recorded["prompt"][0].tolist()
    generated = recorded["sequences"][0].tolist()[len(prompt) :]
    tokenizer.bos_id = prompt[0]  # whatever it starts with
    parts = [" ".join(map(str, prompt[1:]))]
    got = generate_text(config, params, tokenizer, [parts], max_tokens=len(generated))
    assert got[0].tokens == stops(generated, tokenizer)
