"""Generation: the cache changes no number, rows do not see each other, prompts are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monoformer_jax.attention import interval_mask
from monoformer_jax.batch import PATCH, patchify
from monoformer_jax.config import InputError, ModelConfig, SamplingConfig, named_size
from monoformer_jax.data.documents import Image, build
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.generation.image import generate_images
from monoformer_jax.generation.text import generate_text
from monoformer_jax.models import monoformer

TOKENIZER = ByteTokenizer()
PICTURE = Image(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1), denoise=False)
PROMPTS = [["draw a seven"], ["one"], ["read this: ", PICTURE]]


@pytest.fixture(scope="module")
def params(config):
    """Random weights with a text head that is loud enough to have opinions."""
    params = monoformer.init(config.model, jax.random.key(3))
    return params | {"text_head": 5 * params["text_head"]}


@pytest.fixture(scope="module")
def forward(config, params):
    """One uncached pass over a whole document: logits and velocity of every token."""

    @jax.jit
    def run(streams, times):
        model = monoformer.bind(config.model, params)
        mask = interval_mask(streams["kinds"], streams["segment_ids"], streams["image_ids"])
        hidden, _ = model(streams, times, mask)
        return model.text_logits(hidden), model.image_output(hidden, streams["image_ids"], times)

    def padded(document, times):
        n, length = len(document["tokens"]), 64
        row = {k: np.zeros((1, length, *v.shape[1:]), v.dtype) for k, v in document.items()}
        for name, stream in document.items():
            row[name][0, :n] = stream
        row["segment_ids"] = (np.arange(length) < n).astype(np.int32)[None]
        row["positions"] = np.arange(length, dtype=np.int32)[None]
        row["image_ids"] = (np.cumsum(row["kinds"] == 2, 1) * (row["kinds"] > 1)).astype(np.int32)
        logits, velocity = run(row, jnp.asarray(times, jnp.float32)[None])
        return np.asarray(logits)[0, :n], np.asarray(velocity)[0, :n]

    return padded


def greedy_without_cache(forward, prompt, max_tokens):
    never = [TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.image_id, TOKENIZER.im_end_id]
    document, found = None, []
    for _ in range(max_tokens):
        document = build_with(prompt, found)
        last = forward(document, [0.0, 0.0])[0][-1].copy()
        last[never] = -np.inf
        found.append(int(last.argmax()))
        if found[-1] in (TOKENIZER.eos_id, TOKENIZER.im_start_id):
            break
    return found


def build_with(prompt, closing):
    return build(prompt, TOKENIZER, ModelConfig(**named_size("tiny")), closing=closing)


def test_cached_text_equals_one_full_pass_a_token(config, params, forward):
    """A batch of prompts of different lengths, one of them with an image."""
    got = generate_text(config, params, TOKENIZER, PROMPTS, max_tokens=10)
    want = [greedy_without_cache(forward, prompt, 10) for prompt in PROMPTS]
    assert got == want
    assert len({tuple(tokens) for tokens in got}) == 3


def test_a_row_gets_the_same_tokens_whatever_it_is_batched_with(config, params):
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 7}
    together = generate_text(config, params, TOKENIZER, PROMPTS, **options)
    assert generate_text(config, params, TOKENIZER, PROMPTS[:1], **options)[0] == together[0]
    other = generate_text(config, params, TOKENIZER, PROMPTS, **options | {"seed": 8})
    assert other != together


@pytest.mark.parametrize("stop", [TOKENIZER.eos_id, TOKENIZER.im_start_id])
def test_text_stops_at_the_end_or_where_a_picture_starts(config, params, stop):
    """The head's column of what would come third, a little louder, becomes the stop's."""
    free = generate_text(config, params, TOKENIZER, PROMPTS[:1], max_tokens=6)[0]
    head = params["text_head"]
    loud = params | {"text_head": head.at[:, stop].set(1.01 * head[:, free[2]])}
    got = generate_text(config, loud, TOKENIZER, PROMPTS[:1], max_tokens=6)[0]
    assert got == [*free[: free.index(free[2])], stop]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_denoising_equals_full_passes(config, params, forward, guidance):
    """Euler written out over uncached passes of <s> prompt <|im_start|> image."""
    sampling = SamplingConfig("euler", steps=3, guidance=guidance, guidance_high=0.8)
    prompts = PROMPTS[:2]
    got = generate_images(config, params, TOKENIZER, prompts, sampling=sampling, seed=5)
    for i, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(5), i)
        x = np.asarray(jax.random.normal(key, (16, 4)))
        for step in range(3):
            t = 1 - step / 3
            v = []
            for parts in (prompt, []):
                document = build_with([*parts, Image(np.zeros((8, 8, 1)), True)], [])
                patches = document["kinds"] == PATCH
                document["patches"][patches] = x
                v.append(forward(document, [t, 0.0])[1][patches])
            scale = guidance if t <= 0.8 else 1.0
            x = x - (v[1] + scale * (v[0] - v[1])) / 3
        np.testing.assert_allclose(patchify(got[i], 2)[0], x, atol=1e-5)


def test_an_image_depends_on_its_seed_and_number_and_not_on_its_batch(config, params):
    sampling = SamplingConfig("heun", steps=2, guidance=2.0)
    prompts = [["one"], ["two"], ["three"]]
    three = generate_images(config, params, TOKENIZER, prompts, sampling=sampling, seed=1)
    last = generate_images(
        config, params, TOKENIZER, prompts[2:], sampling=sampling, seed=1, first=2
    )
    np.testing.assert_allclose(three[2], last[0], atol=1e-5)
    other = generate_images(config, params, TOKENIZER, prompts, sampling=sampling, seed=2)
    assert np.abs(three - other).max() > 0.1


def test_prompts_that_cannot_be_continued_are_refused(config, params):
    with pytest.raises(InputError, match="prompt 2 is empty"):
        generate_text(config, params, TOKENIZER, [["a"], [""]], max_tokens=4)
    with pytest.raises(InputError, match="prompt 1 has 158 tokens and 4 are to follow"):
        generate_text(config, params, TOKENIZER, [["a" * 157]], max_tokens=4)
    with pytest.raises(InputError, match="prompt 1 has 159 tokens and 17 are to follow"):
        sampling = dataclasses.replace(config.sampling, steps=1)
        generate_images(config, params, TOKENIZER, [["a" * 157]], sampling=sampling)
