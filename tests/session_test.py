"""Sessions of text and images: outputs equal one uncached forward pass over the sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import logits_of, output_of, random_params

from monoformer_jax.batch import PATCH, TEXT, patchify
from monoformer_jax.config import SamplingConfig
from monoformer_jax.data.documents import Features, Image, build_document
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import OriginalConfig, attention_mask
from monoformer_jax.sampling import text
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.state import prefill
from monoformer_jax.sampling.text import SamplingParams

TOKENIZER = ByteTokenizer()
STEPS = 2
pytestmark = pytest.mark.slow
SAMPLING = SamplingConfig("euler", steps=STEPS, guidance=2.0)
EDITING = dataclasses.replace(SAMPLING, image_guidance=1.5)
PICTURE = Image(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1), denoise=False)


@pytest.fixture(scope="module")
def interleaved(config):
    """A context that is long enough for several images."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_seq_len=256))


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


def full_pass(c, params):
    """(document, noise levels of its images) -> logits and image output of every token, uncached."""

    @jax.jit
    def run(streams, times):
        model = monoformer.bind(c, params)
        hidden, _ = model(streams, times, attention_mask(c, streams))
        return logits_of(model, hidden), output_of(model, hidden, streams["image_ids"], times)

    def padded(document, times, length=256):
        n = len(document["tokens"])
        row = {
            k: np.pad(v, [(0, length - n)] + [(0, 0)] * (v.ndim - 1)) for k, v in document.items()
        }
        row["positions"] = np.arange(length, dtype=np.int32)
        times = np.pad(np.asarray(times, np.float32), (0, 12 - len(times)))
        logits, output = run({k: v[None] for k, v in row.items()}, times[None])
        return np.asarray(logits)[0, :n], np.asarray(output)[0, :n]

    return padded


@pytest.fixture(scope="module")
def forward(interleaved, params):
    return full_pass(interleaved.model, params)


def session(config, params, rows, sampling=SAMPLING, **options):
    chosen = SamplingParams(temperature=0.8)
    return Session(
        Sampler(config, params, TOKENIZER), rows, sampling=sampling, text=chosen, **options
    )


@pytest.fixture(scope="module")
def talk(interleaved, params):
    """Two rows, three turns: input images, text and generated images, not both rows in every turn."""
    s = session(interleaved, params, 2, seed=[4, 5])
    turns = [[["draw"], ["read this: ", PICTURE]],
             [["and now another"], None],
             [None, ["b", PICTURE, "c"]],
             [[" so"], ["?"]]]  # fmt: skip
    replies = []
    for turn in turns[:-1]:
        s.append(turn)
        replies.append(s.generate(max_tokens=12))
    s.append(turns[-1])
    return s, turns, [*replies, [[], []]]


def test_the_conversation_covers_all_cases(talk):
    s, _, replies = talk
    images = [[sum(not isinstance(x, str) for x in reply) for reply in turn] for turn in replies]
    assert max(map(max, images)) >= 2, "no row generated two images in one reply"
    assert min(map(min, images)) == 0 and len({tuple(row) for row in zip(*images)}) > 1
    assert any(isinstance(x, str) for turn in replies for reply in turn for x in reply)
    assert len(set(s.lengths)) == 2


def test_next_token_logits_equal_one_full_pass(talk, forward, params, interleaved):
    s, _, _ = talk
    model = monoformer.bind(interleaved.model, params)
    logits = np.asarray(logits_of(model, s._sequences.state.hidden))
    for row in range(2):
        want, _ = forward(s.document(row), [0.0] * 12)
        np.testing.assert_allclose(logits[row], want[-1], atol=1e-5)


def test_the_cache_equals_that_of_a_prefill_of_the_sequence(talk, interleaved, params):
    s, _, _ = talk
    for row in range(2):
        document = s.document(row)
        fresh = prefill(Sampler(interleaved, params, TOKENIZER), [document])
        n = len(document["tokens"])
        for name in ("k", "v"):
            got = np.asarray(getattr(s._sequences.state.cache, name))[:, row, -n:]
            want = np.asarray(getattr(fresh.state.cache, name))[:, 0, -n:]
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert s.lengths[row] == n
        np.testing.assert_array_equal(s._sequences.seen[row], fresh.seen[0])


def test_the_sequence_is_one_document_of_all_turns(talk, interleaved):
    s, turns, replies = talk
    for row in range(2):
        parts = []
        for turn, reply in zip(turns, replies):
            parts += turn[row] or []
            parts += [x if isinstance(x, str) else Image(x, denoise=False) for x in reply[row]]
        want = build_document(parts, TOKENIZER, interleaved.model.layout, closing=[])
        got = s.document(row)
        images, painted = got["token_types"] == PATCH, want["token_types"] == PATCH
        np.testing.assert_array_equal(got["patches"][images], want["patches"][painted])
        ends = (got["tokens"] == TOKENIZER.im_end_id).sum()
        assert ends == sum(not isinstance(part, str) for part in parts)
        said = TOKENIZER.decode(got["tokens"][got["token_types"] == TEXT].tolist())
        assert said == "".join(part for part in parts if isinstance(part, str))


def test_every_generated_image_equals_uncached_denoising(talk, forward, interleaved):
    """Each image is denoised again from its noise, by full passes over its prefix."""
    s, turns, replies = talk
    checked = 0
    for row in range(2):
        document, painted = s.document(row), 0
        opened = np.flatnonzero(document["tokens"] == TOKENIZER.im_start_id)
        images = iter(shown_or_painted(turns, replies, row))
        for start in opened:
            image = next(images)
            if image is None:
                continue  # the user's
            before = {k: v[: start + 1] for k, v in document.items()}
            x = start_noise(4 + row, painted)
            want = denoised(forward, before, x, interleaved.model)
            np.testing.assert_allclose(patchify(image, 2)[0], want, atol=2e-5)
            painted, checked = painted + 1, checked + 1
    assert checked >= 4


def shown_or_painted(turns, replies, row):
    """The images of a row in order, None for those of the user."""
    for turn, reply in zip(turns, replies):
        yield from [None for part in turn[row] or () if not isinstance(part, str)]
        yield from [part for part in reply[row] if not isinstance(part, str)]


def start_noise(seed, number):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if number:
        key = jax.random.fold_in(key, np.uint32(2**31 + number))
    return np.asarray(jax.random.normal(key, (16, 4)))


def denoised(forward, before, x, model):
    """Euler steps with two branches: the full prefix, and the prefix without text."""
    kept = (before["token_types"] != TEXT) | np.isin(before["tokens"], (1, 4, 5))
    branches = [before, {k: v[kept] for k, v in before.items()}]
    block = build_document([Image(np.zeros((8, 8, 1)), True)], TOKENIZER, model.layout, closing=[])
    block = {k: v[2:-1] for k, v in block.items()}
    for step in range(STEPS):
        t, v = 1 - step / STEPS, []
        for prefix in branches:
            document = {k: np.concatenate([prefix[k], block[k]]) for k in block}
            image = document["denoise"] & (document["token_types"] == PATCH)
            document["patches"][image] = x
            context = prefix["image_ids"].max()
            document["image_ids"] = np.append(prefix["image_ids"], block["image_ids"] + context)
            v.append(forward(document, [0.0] * context + [t])[1][image])
        x = x - (v[1] + 2.0 * (v[0] - v[1])) / STEPS
    return x


def test_a_row_is_batch_invariant(talk, interleaved, params):
    _, turns, replies = talk
    alone = session(interleaved, params, 1, seed=[5])
    for turn, reply in zip(turns[:-1], replies):
        if turn[1] is None:
            continue
        alone.append([turn[1]])
        got = alone.generate(max_tokens=12)[0]
        assert [x for x in got if isinstance(x, str)] == [x for x in reply[1] if isinstance(x, str)]
        pairs = zip(got, reply[1], strict=True)
        for mine, theirs in ((a, b) for a, b in pairs if not isinstance(a, str)):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_the_first_image_equals_generate_images(interleaved, params):
    """Also for editing with two guidance scales, and for a non-square size."""
    s = session(interleaved, params, 2, EDITING, seed=9)
    prompts = [["draw"], [PICTURE, "darker"]]
    s.append(prompts)
    s.begin_image([0, 1])
    got = s.generate_images([0, 1], size=(4, 8))

    def want(sampling):
        sampler = Sampler(interleaved, params, TOKENIZER)
        return generate_images(sampler, prompts, sampling=sampling, seed=9, size=(4, 8))

    assert got.shape == (2, 4, 8, 1)
    np.testing.assert_allclose(got, want(EDITING), atol=1e-5)
    changed = want(dataclasses.replace(EDITING, image_guidance=4.0))
    np.testing.assert_allclose(changed[0], got[0], atol=1e-5)
    assert np.abs(changed[1] - got[1]).max() > 0.01


def test_generated_images_are_reencoded_by_the_vision_encoder(interleaved):
    model = dataclasses.replace(
        interleaved.model, feature_dim=6, original=OriginalConfig(context_images="causal")
    )
    config = dataclasses.replace(interleaved, model=model)
    params = monoformer.init(model, jax.random.key(0))
    with pytest.raises(InputError, match="with a vision encoder"):
        session(config, params, 1)
    seen = []

    def reencode(pixels):
        seen.append(pixels)
        return Features(np.tile(pixels.mean((1, 2))[:6], (5, 1)).astype(np.float32))

    s = session(config, params, 1, reencode=reencode)
    s.append([["a", Features(np.ones((5, 6), np.float32)), "b"]])
    s.begin_image([0])
    (painted,) = s.generate_images([0])
    np.testing.assert_array_equal(painted, seen[0])
    want, _ = full_pass(model, params)(s.document(0), [0.0, 0.0])
    logits = logits_of(monoformer.bind(model, params), s._sequences.state.hidden)
    np.testing.assert_allclose(logits[0], want[-1], atol=1e-5)
    assert jnp.isfinite(logits).all()


def test_a_stop_string_is_removed_from_the_row(interleaved, params, monkeypatch):
    """Also if it begins in tokens that are already in the cache."""
    monkeypatch.setattr(text, "_CHUNK", 4)
    letters = np.isin(np.arange(params["text_head"].shape[1]), TOKENIZER.encode("abcdefghijklmnop"))
    params = params | {"text_head": params["text_head"] * letters}

    def written(stop):
        s = Session(Sampler(interleaved, params, TOKENIZER), 1, text=SamplingParams(stop=stop))
        s.append([["so"]])
        return s, s.generate_text([12])[0]

    _, free = written(())
    assert len(free.tokens) == len(free.text) == 12, free
    s, got = written((free.text[2:6],))
    assert (got.text, got.finish_reason) == (free.text[:2], "stop")
    assert s.lengths[0] == len(s.document(0)["tokens"]) == 1 + 2 + 2
    with pytest.raises(InputError, match="row 0 has nothing to continue"):
        s.generate_text([4])
    s.append([["!"]])
    fresh = Session(Sampler(interleaved, params, TOKENIZER), 1)
    fresh.append([["so" + got.text + "!"]])
    np.testing.assert_allclose(s._sequences.state.hidden, fresh._sequences.state.hidden, atol=1e-5)


def test_invalid_turns_raise_one_sentence_and_change_nothing(interleaved, params):
    s = session(interleaved, params, 2)
    s.append([["a"], ["b"]])
    large = Image(np.zeros((16, 8, 1), np.float32), denoise=False)
    for turn, message in (
        ([["a"], [""]], "the turn of row 2 is empty"),
        ([["a"]], "1 turns for 2 rows"),
        ([[large], None], "an image in the turn of row 1 is 16×8, but the model was trained up to"),
        ([["ok"], ["b" * 255]], "in row 1 would have 257 tokens, but the model's .* 256"),
    ):
        with pytest.raises(InputError, match=message):
            s.append(turn)
    assert list(s.lengths) == [2, 2]
    with pytest.raises(InputError, match="row 1 has not begun an image"):
        s.generate_images([1])


def test_a_full_context(interleaved, params):
    """A turn that leaves no space for an answer is refused; an answer ends when the context is full."""

    def alone(max_seq_len):
        data = dataclasses.replace(interleaved.data, max_seq_len=max_seq_len)
        return session(dataclasses.replace(interleaved, data=data), params, 1)

    s = alone(25)
    s.append([["a" * 24]])
    with pytest.raises(InputError, match=r"^the conversation would have 26 tokens, but .* is 25 "):
        s.generate(max_tokens=4)
    s = alone(21)
    s.append([["a"]])
    s.begin_image([0])
    s.generate_images([0])
    assert s.lengths[0] == 21
    (written,) = s.generate_text([4])
    assert (written.tokens, written.finish_reason) == ([], "full")
