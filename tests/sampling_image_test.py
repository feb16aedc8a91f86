"""Sampling: cached equals uncached, rows are batch-invariant, prompts are validated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import logits_of, output_of

from monoformer_jax.attention import interval_mask
from monoformer_jax.batch import PATCH, patchify
from monoformer_jax.config import SamplingConfig
from monoformer_jax.data.documents import EndOfTurn, Image, build_document
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer, named_size
from monoformer_jax.models.monoformer import MonoFormerConfig
from monoformer_jax.sampling import image, text
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.prompts import guidance_documents, negative_parts
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingArrays, SamplingParams, generate_text, sample_token

TOKENIZER = ByteTokenizer()
PICTURE = Image(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1), denoise=False)
PROMPTS = [["draw a seven"], ["one"], ["read this: ", PICTURE]]


@pytest.fixture(scope="module")
def params(config):
    """Random weights with a scaled text head, so that logits differ clearly."""
    params = monoformer.init(config.model, jax.random.key(3))
    return params | {"text_head": 5 * params["text_head"]}


@pytest.fixture(scope="module")
def forward(config, params):
    """One uncached pass over a complete document: logits and velocity of every token."""

    @jax.jit
    def run(streams, times):
        model = monoformer.bind(config.model, params)
        mask = interval_mask(streams["token_types"], streams["segment_ids"], streams["image_ids"])
        hidden, _ = model(streams, times, mask)
        return logits_of(model, hidden), output_of(model, hidden, streams["image_ids"], times)

    def padded(document, times):
        n, length = len(document["tokens"]), 64
        row = {k: np.zeros((1, length, *v.shape[1:]), v.dtype) for k, v in document.items()}
        for name, stream in document.items():
            row[name][0, :n] = stream
        row["segment_ids"] = (np.arange(length) < n).astype(np.int32)[None]
        row["positions"] = np.arange(length, dtype=np.int32)[None]
        row["image_ids"] = (
            np.cumsum(row["token_types"] == 2, 1) * (row["token_types"] > 1)
        ).astype(np.int32)
        logits, velocity = run(row, jnp.asarray(times, jnp.float32)[None])
        return np.asarray(logits)[0, :n], np.asarray(velocity)[0, :n]

    return padded


def greedy_without_cache(forward, prompt, max_tokens):
    never = [TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.image_id, TOKENIZER.im_end_id]
    found = []
    for _ in range(max_tokens):
        last = forward(build_with(prompt, found), [0.0, 0.0])[0][-1].copy()
        last[never] = -np.inf
        found.append(int(last.argmax()))
        if found[-1] in (TOKENIZER.eos_id, TOKENIZER.im_start_id):
            return found[:-1]
    return found


def build_with(prompt, closing):
    return build_document(
        prompt, TOKENIZER, MonoFormerConfig(**named_size("tiny")).layout, closing=closing
    )


def tokens(written):
    return [w.tokens for w in written]


def test_cached_text_equals_one_full_pass_per_token(config, params, forward, monkeypatch):
    """Prompts of different lengths, one with an image, in a cache that grows every four tokens."""
    monkeypatch.setattr(text, "_CHUNK", 4)
    got = generate_text(Sampler(config, params, TOKENIZER), PROMPTS, max_tokens=10)
    assert tokens(got) == [greedy_without_cache(forward, prompt, 10) for prompt in PROMPTS]
    assert [w.finish_reason for w in got] == ["length", "length", "image"]
    assert got[0].tokens != got[1].tokens and len(got[0].tokens) == 10
    assert [w.text for w in got] == [TOKENIZER.decode(w.tokens) for w in got]


def test_tokens_are_batch_invariant(config, params):
    """Each row has its own settings and its own seed."""
    settings = {"temperature": [1.0, 0.7, 0.0], "top_k": [0, 5, 0], "top_p": [0.9, 1.0, 1.0],
                "repetition_penalty": [1.0, 1.0, 1.3]}  # fmt: skip
    seeds = [7, 8, 9]

    def write(rows, seeds=seeds):
        chosen = {name: [values[i] for i in rows] for name, values in settings.items()}
        sampler = Sampler(config, params, TOKENIZER)
        return tokens(generate_text(sampler, [PROMPTS[i] for i in rows], max_tokens=8,
            sampling=SamplingParams(**chosen), seed=[seeds[i] for i in rows],
        ))  # fmt: skip

    together = write([0, 1, 2])
    assert [write([i])[0] for i in range(3)] == together
    assert write([2, 1, 0]) == together[::-1]
    again = write([0, 1, 2], [1, 2, 3])
    assert again[:2] != together[:2] and again[2] == together[2]


@pytest.mark.slow
def test_settings_and_prompts_of_the_same_bucket_are_compiled_once(config, params):
    before = text.decode_tokens._cache_size()
    for number, temperature in enumerate((0.0, 0.5, 2.0)):
        sampling = SamplingParams(temperature, top_k=number, top_p=1 - number / 4)
        sampler = Sampler(config, params, TOKENIZER)
        generate_text(sampler, [["a" * (3 + number)]] * 3, max_tokens=8 - number,
                      sampling=sampling, seed=number)  # fmt: skip
    assert text.decode_tokens._cache_size() <= before + 1


def choice(rows, vocabulary, **changes):
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    arrays = {k: np.full(rows, v, np.int32 if k == "top_k" else np.float32)
              for k, v in (plain | changes).items()}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), rows)
    allowed = np.arange(vocabulary) != 0
    return SamplingArrays(**arrays, keys=keys, allowed=allowed, stops=np.zeros(vocabulary, bool))


@pytest.mark.parametrize(
    "changes, seen, shares",
    [
        ({}, [], [0, 0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [], [0, 16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [], [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [], [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [], [0, 4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [], [0, 4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0}, [], [0, 1, 0, 0, 0]),
        # log(0.4) / 0.5 and log(0.3) / 0.5 would be lower; negative logits are multiplied.
        ({"repetition_penalty": 2.0}, [1], [0, 0.16 / 0.76, 0.3 / 0.76, 0.2 / 0.76, 0.1 / 0.76]),
    ],
)
def test_tokens_are_sampled_with_their_probabilities(changes, seen, shares):
    """Token 0 is by far the most likely one, and not allowed."""
    rows = 20_000
    logits = jnp.log(jnp.array([1000.0, 0.4, 0.3, 0.2, 0.1]))
    said = jnp.zeros((rows, 5), bool).at[:, jnp.array(seen, int)].set(True)
    c = choice(rows, 5, **changes)
    drawn = jax.jit(sample_token)(jnp.broadcast_to(logits, (rows, 5)), said, c.keys, c)
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / rows, shares, atol=0.015)


@pytest.mark.parametrize(
    "stop, finish_reason", [(TOKENIZER.eos_id, "end"), (TOKENIZER.im_start_id, "image")]
)
def test_text_stops_at_eos_or_im_start(config, params, stop, finish_reason):
    """The stop token gets the slightly scaled head column of the third token."""
    free = generate_text(Sampler(config, params, TOKENIZER), PROMPTS[:1], max_tokens=6)[0].tokens
    head = params["text_head"]
    loud = params | {"text_head": head.at[:, stop].set(1.01 * head[:, free[2]])}
    got = generate_text(Sampler(config, loud, TOKENIZER), PROMPTS[:1], max_tokens=6)[0]
    assert (got.tokens, got.finish_reason) == (free[: free.index(free[2])], finish_reason)
    if finish_reason == "image":
        kept = generate_text(
            Sampler(config, loud, TOKENIZER), PROMPTS[:1], max_tokens=6, allow_images=False
        )[0]
        assert kept.tokens == free


def test_text_ends_before_a_stop_string_and_when_the_context_is_full(config, params):
    free = generate_text(Sampler(config, params, TOKENIZER), PROMPTS[:1], max_tokens=8)[0]
    stop = free.text[3:5]
    got = generate_text(Sampler(config, params, TOKENIZER), PROMPTS[:1], max_tokens=8,
                        sampling=SamplingParams(stop=("never said", stop)))[0]  # fmt: skip
    assert (got.text, got.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_seq_len=64))
    got = generate_text(
        Sampler(short, params, TOKENIZER), [["a" * 59]], max_tokens=8, allow_images=False
    )[0]
    assert len(got.tokens) == 4 and got.finish_reason == "full"


@pytest.mark.parametrize("guidance, negative", [(1.0, ""), (3.0, ""), (3.0, "nine of them")])
def test_cached_denoising_equals_full_passes(config, params, forward, guidance, negative):
    """Euler written out over uncached passes of <s> prompt <|im_start|> image."""
    sampling = SamplingConfig(
        "euler", steps=3, guidance=guidance, guidance_high=0.8, negative_prompt=negative
    )
    prompts = PROMPTS[:2]
    got = generate_images(Sampler(config, params, TOKENIZER), prompts, sampling=sampling, seed=5)
    for i, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(5), i)
        x = np.asarray(jax.random.normal(key, (16, 4)))
        for step in range(3):
            t = 1 - step / 3
            v = []
            for parts in (prompt, [negative] if negative else []):
                document = build_with([*parts, Image(np.zeros((8, 8, 1)), True)], [])
                patches = document["token_types"] == PATCH
                document["patches"][patches] = x
                v.append(forward(document, [t, 0.0])[1][patches])
            scale = guidance if t <= 0.8 else 1.0
            x = x - (v[1] + scale * (v[0] - v[1])) / 3
        np.testing.assert_allclose(patchify(got[i], 2)[0], x, atol=1e-5)
    if negative:
        session = Session(Sampler(config, params, TOKENIZER), 2, seed=5, sampling=sampling)
        session.append(prompts)
        session.begin_image([0, 1])
        np.testing.assert_allclose(session.generate_images([0, 1]), got, atol=1e-5)
        with pytest.raises(InputError, match="the negative prompt has 202 tokens and 17 must"):
            long = dataclasses.replace(sampling, negative_prompt="a" * 200)
            generate_images(Sampler(config, params, TOKENIZER), prompts, sampling=long)


def test_a_negative_prompt_follows_the_images_of_the_prompt(config):
    """The branch that guidance leads away from: images as they stand, the negative text, its end."""
    layout, closing = config.layout, [TOKENIZER.im_start_id]
    document = build_document([PICTURE, "red", EndOfTurn()], TOKENIZER, layout, closing=closing)
    ends = dataclasses.replace(config, data=dataclasses.replace(config.data, end_of_prompt=True))
    negative = negative_parts(Sampler(ends, {}, TOKENIZER), SamplingConfig(negative_prompt="blue"))
    got = guidance_documents(document, TOKENIZER, layout, 3, negative)
    want = [
        build_document(parts, TOKENIZER, layout, closing=closing)
        for parts in ([PICTURE, "red", EndOfTurn()], [PICTURE, "blue", EndOfTurn()], [])
    ]
    for branch, expected in zip(got, want, strict=True):
        for field in ("tokens", "token_types", "positions", "image_ids", "patches"):
            np.testing.assert_array_equal(branch[field], expected[field], field)


def test_an_image_depends_on_its_seed_and_number_and_not_on_its_batch(config, params):
    sampling = SamplingConfig("heun", steps=2, guidance=2.0)
    prompts = [["one"], ["two"], ["three"]]
    three = generate_images(Sampler(config, params, TOKENIZER), prompts, sampling=sampling, seed=1)
    last = generate_images(
        Sampler(config, params, TOKENIZER), prompts[2:], sampling=sampling, seed=1, first=2
    )
    np.testing.assert_allclose(three[2], last[0], atol=1e-5)
    other = generate_images(Sampler(config, params, TOKENIZER), prompts, sampling=sampling, seed=2)
    assert np.abs(three - other).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_steps_guidance_and_seeds_are_compiled_once(config, params, solver):
    """Also prompts of one bucket, and sampling with previews."""
    params = jax.device_put(params, jax.devices()[0])  # as weights from a checkpoint are
    before, shown = image.denoise._cache_size(), []
    for steps, guidance, every in ((1, 2.0, 0), (5, 3.0, 0), (7, 1.5, 3)):
        sampling = SamplingConfig(solver, steps, guidance, guidance_rescale=0.1 * steps)
        last = generate_images(Sampler(config, params, TOKENIZER), [["a" * steps]], sampling=sampling,
                               seed=steps, preview=lambda *x: shown.append(x), every=every)  # fmt: skip
    assert image.denoise._cache_size() <= before + 1
    assert [step for step, _ in shown] == [1, 5, 3, 6, 7]
    assert all(images.shape == (1, 8, 8, 1) and np.isfinite(images).all() for _, images in shown)
    np.testing.assert_array_equal(shown[-1][1], last)
    whole = generate_images(
        Sampler(config, params, TOKENIZER), [["aaaaaaa"]], sampling=sampling, seed=7
    )
    np.testing.assert_array_equal(whole, last)


def test_invalid_input_raises_one_sentence(config, params):
    def write(*prompts, **settings):
        generate_text(Sampler(config, params, TOKENIZER), prompts, max_tokens=4, **settings)

    def draw(prompt="a", size=None, **settings):
        sampling = dataclasses.replace(config.sampling, **settings)
        generate_images(
            Sampler(config, params, TOKENIZER), [[prompt]], sampling=sampling, size=size
        )

    large = Image(np.zeros((8, 10, 1), np.float32), denoise=False)
    for call, message in (
        (lambda: write(["a"], [""]), "prompt 2 is empty"),
        (lambda: write(["a" * 160]), "prompt 1 has 161 tokens and 1 must follow"),
        (lambda: write(["a", large]), "image in prompt 1 is 8×10, but the model was trained up to"),
        (lambda: write(["a"], seed=[1, 2]), "2 seeds for 1 rows"),
        (lambda: write(["a"], seed=-1), "seed=-1 is not between"),
        (lambda: SamplingParams(temperature=-1.0), "temperature=-1.0 must be 0"),
        (lambda: SamplingParams(top_p=[0.5, 0.0]), "top_p=\\[0.5, 0.0\\] must be above 0"),
        (lambda: SamplingParams(top_k=-1), "top_k=-1 must be 0"),
        (lambda: SamplingParams(repetition_penalty=0), "repetition_penalty=0 must be above 0"),
        (lambda: draw(""), "prompt 1 is empty"),
        (lambda: draw("a" * 157), "prompt 1 has 159 tokens and 17 must follow"),
        (lambda: draw(size=(8, 16)), "the image to generate is 8×16, but the model was trained up to"),
        (lambda: draw(size=(8, 7)), "both sides must be multiples of the patch size 2"),
        (lambda: draw(guidance=0.0), "guidance=0.0 must be above 0"),
        (lambda: draw(guidance=-2.0), "guidance=-2.0 must be above 0"),
        (lambda: draw(steps=0), "steps=0 must be above 0"),
        (lambda: draw(steps=1001), "steps=1001 must be 1000 or less"),
        (lambda: draw(solver="rk4"), "solver='rk4' does not sample"),
        (lambda: draw(solver="ddim"), "'ddim' does not sample objective.kind='rectified_flow'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
