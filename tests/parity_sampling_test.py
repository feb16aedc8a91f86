"""Parity of image and text sampling with recorded outputs, in the cached code that users run."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import cases, channels_last, close, label, logits_of, sections_of
from parity_model import IdTokenizer, inputs_of, load, run_config, vary

from monoformer_jax.batch import patchify, stack, unpatchify
from monoformer_jax.data.documents import Features, build_document
from monoformer_jax.diffusion import ddpm
from monoformer_jax.diffusion.solvers import make_time_grid, solve
from monoformer_jax.models import monoformer
from monoformer_jax.sampling.image import make_denoiser, make_guidance, make_image_spec
from monoformer_jax.sampling.prompts import bucket
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.state import prefill
from monoformer_jax.sampling.text import generate_text


class Recorded:
    """The recorded prompts of a sampling case, prepared for denoising."""

    def __init__(self, folder, case):
        self.recorded, changes = inputs_of(folder, case)
        model, params = load(folder)
        self.model = vary(model, changes)
        self.side = self.recorded["z"].shape[-1]
        self.n = len(self.recorded["z"]) // 2
        tokenizer = IdTokenizer(folder.config)
        prompts = []
        for ids in self.recorded["input_ids"].tolist():
            image = ids.index(tokenizer.image_id)
            assert ids[0] == tokenizer.bos_id and ids[image - 1] == tokenizer.im_start_id
            text = " ".join(map(str, ids[1 : image - 1]))
            prompts.append([text] if text else [])
        self.config = run_config(folder, self.model)
        self.sampler = Sampler(self.config, params, tokenizer)
        self.prompts = [
            build_document(prompt, tokenizer, self.model.layout, closing=[tokenizer.im_start_id])
            for prompt in prompts
        ]
        self.sections = sections_of(self.recorded["timestep_map"])

    def make_denoiser(self, branches):
        """With two branches, the second half of the recorded prompts is unconditional."""
        scale = float(self.recorded["cfg_scale"])
        sampling = dataclasses.replace(self.config.sampling, guidance=scale)
        pairs = zip(self.prompts[: self.n], self.prompts[self.n :])
        prompts = self.prompts if branches == 1 else [prompt for pair in pairs for prompt in pair]
        state = prefill(self.sampler, prompts).state
        spec = make_image_spec(self.model, sampling, (self.side, self.side), branches)
        return make_denoiser(self.sampler.params, state, spec, make_guidance(sampling))

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
            made[folder.path, case] = Recorded(folder, case)
        return made[folder.path, case]

    return make


@pytest.mark.parametrize("folder, case", cases("guidance"), ids=label)
def test_one_guided_evaluation(sampler, folder, case):
    s = sampler(folder, case)
    recorded = s.recorded
    t = ddpm.step_to_t(recorded["fw_t"][0])
    assert (recorded["fw_t"] == recorded["fw_t"][0]).all()
    guided = jax.jit(lambda x: s.make_denoiser(2)(x, t))(s.patches(recorded["z"][: s.n]))
    close(s.output(*guided), recorded["fw_x_out"][: s.n])
    if "fw_x_out_nocfg" in recorded:
        plain = jax.jit(lambda x: s.make_denoiser(1)(x, t))(s.patches(recorded["z"]))
        close(s.output(*plain), recorded["fw_x_out_nocfg"])


@pytest.mark.parametrize("folder, case", cases("sampling", "clipped sampling", "ddim"), ids=label)
def test_sampling_loops(sampler, folder, case):
    """All steps with the recorded noise, to 1e-4 of the largest value."""
    s = sampler(folder, case)
    recorded, start = s.recorded, s.patches(s.recorded["z"][: s.n])
    chains = {
        "final": ("ddpm", False),
        "final_clip": ("ddpm", True),
        "ddim_final": ("ddim", False),
    }
    grid = make_time_grid("ddpm", s.sections)

    def run(x, solver, clip):
        draw = lambda i: jax.numpy.asarray(s.noise())[i]  # noqa: E731
        return solve(solver, s.make_denoiser(2), x, grid, draw=draw, clip=clip)[0]

    for name, (solver, clip) in chains.items():
        if name not in recorded:
            continue
        got = s.pictures(jax.jit(run, static_argnums=(1, 2))(start, solver, clip))
        want = recorded[name][: s.n]
        close(got / np.abs(want).max(), want / np.abs(want).max(), 1e-4)


@pytest.mark.parametrize("folder, case", cases("first step", "first clipped step"), ids=label)
def test_first_step(sampler, folder, case):
    s = sampler(folder, case)
    schedule = ddpm.make_schedule(s.sections)
    k = len(schedule) - 1
    start, draw = s.patches(s.recorded["z"][: s.n]), s.noise()[0]
    t = ddpm.step_to_t(schedule.timestep_map[k])
    predicted, variance = jax.jit(lambda x: s.make_denoiser(2)(x, t))(start)
    for clip, names in ((False, ("sample_step0", "pred_xstart_step0")),
                        (True, ("sample_clip_step0",))):  # fmt: skip
        p = ddpm.p_mean_variance(start, predicted, variance, np.array(k), schedule, clip)
        drawn = p.mean + np.exp(0.5 * p.log_variance) * draw
        for name, value in zip(names, (drawn, p.clean)):
            if name in s.recorded:
                want = s.recorded[name][: s.n]
                close(s.pictures(value) / np.abs(want).max(), want / np.abs(want).max(), 1e-4)


def same_text(got, want, tokenizer):
    """Ours ends before </s> and never emits other special tokens: until then both must be equal."""
    never = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.im_start_id,
             tokenizer.im_end_id)  # fmt: skip
    for i, token in enumerate(want):
        if token in never:
            return got[:i] == want[:i]
        if token == tokenizer.eos_id:
            return got == want[:i]
    return got == want


def uncached(model, params, streams):
    """Logits [B, L, V] of complete prompts."""
    bound = monoformer.bind(model, params)

    @jax.jit
    def run(streams):
        mask = monoformer.attention_mask(model, streams)
        hidden, _ = bound(streams, np.zeros((len(streams["tokens"]), 1)), mask)
        return logits_of(bound, hidden)

    return np.asarray(run(streams))[..., : model.vocab_size]


def prompts_of(folder, case, tokenizer):
    """Converts the rows of a case to prompts: text of ids, and features at the image id."""
    recorded = folder.cases[case]
    # A case without features uses those of the first case that has some.
    held = [
        a["vision_features"] for a in (recorded, *folder.cases.values()) if "vision_features" in a
    ]
    features = iter(held[0]) if held else None
    image = [tokenizer.im_start_id, tokenizer.image_id, tokenizer.im_end_id]
    prompts = []
    for ids in recorded["input_ids"].tolist():
        assert ids[0] == tokenizer.bos_id
        parts, start = [], 1
        while tokenizer.image_id in ids[start:]:
            at = ids.index(tokenizer.image_id, start)
            assert ids[at - 1 : at + 2] == image
            parts += [" ".join(map(str, ids[start : at - 1])), Features(next(features))]
            start = at + 2
        parts.append(" ".join(map(str, ids[start:])))
        prompts.append([part for part in parts if part != ""])
    return prompts


@pytest.mark.parametrize("folder, case", cases("writing"), ids=label)
def test_text_token_for_token(folder, case):
    recorded, (model, params) = folder.cases[case], load(folder)
    tokenizer, config = IdTokenizer(folder.config), run_config(folder, model)
    prompts, generated = prompts_of(folder, case, tokenizer), recorded["generated"].tolist()
    read = []
    for parts, ids in zip(prompts, generated):
        text = " ".join(map(str, ids[:-1]))
        joined = isinstance(parts[-1], str)  # its ids are separated by spaces
        read.append([*parts[:-1], f"{parts[-1]} {text}"] if joined else [*parts, text])
    documents = [build_document(parts, tokenizer, model.layout, closing=[]) for parts in read]
    slots = bucket(max(len(document["tokens"]) for document in documents))
    streams = stack(documents, slots, tokenizer.pad_id)
    streams["positions"] = np.broadcast_to(np.arange(slots), streams["tokens"].shape)
    logits = uncached(model, params, streams)[streams["segment_ids"] > 0]
    logits = logits.reshape(len(prompts), -1, model.vocab_size)
    prompt = recorded.get("prefill_logits", recorded.get("logits"))
    scores = recorded.get("scores", np.zeros((len(prompts), 0, model.vocab_size)))
    close(logits[:, : prompt.shape[1]], prompt)
    close(logits[:, prompt.shape[1] - 1 :][:, : scores.shape[1]], scores)
    got = generate_text(Sampler(config, params, tokenizer), prompts, max_tokens=len(generated[0]))
    written = [text.tokens for text in got]
    assert all(same_text(*texts, tokenizer) for texts in zip(written, generated)), written


@pytest.mark.parametrize("folder, case", cases("layers"), ids=label)
def test_llama_layer_by_layer(folder, case):
    recorded = folder.cases[case]
    model, params = load(folder)
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    valid = mask.astype(bool)
    B, L = ids.shape
    streams = {
        "tokens": ids,
        "token_types": mask.astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.broadcast_to(np.arange(L), (B, L)),
        "image_ids": np.zeros((B, L), np.int32),
        "denoise": np.zeros((B, L), bool),
        "patches": np.zeros((B, L, model.layout.patch_dim), np.float32),
        "patch_positions": np.zeros((B, L, 2), np.int32),
    }
    # The four additional tokens of ours do not change the logits of the others.
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
        # Ours includes the final norm, the recorded intermediate state does not.
        close(hidden[valid], bound.decoder.norm(recorded[f"hidden_{depth}"])[valid])


@pytest.mark.parametrize("folder, case", cases("continuation"), ids=label)
def test_llama_token_for_token(folder, case):
    recorded = folder.cases[case]
    model, params = load(folder)
    tokenizer, config = IdTokenizer(folder.config), run_config(folder, model)
    for prompt, sequence in zip(recorded["prompt"].tolist(), recorded["sequences"].tolist()):
        assert sequence[: len(prompt)] == prompt
        generated = sequence[len(prompt) :]
        tokenizer.bos_id = prompt[0]  # the first token of the recorded prompt
        parts = [" ".join(map(str, prompt[1:]))]
        got = generate_text(Sampler(config, params, tokenizer), [parts], max_tokens=len(generated))
        assert same_text(got[0].tokens, generated, tokenizer), (got[0].tokens, generated)
