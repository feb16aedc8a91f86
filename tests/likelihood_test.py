"""Log-likelihoods of texts: against recorded ones of a LLaMA, and against single texts."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import FOLDERS, random_params
from parity_model import IdTokenizer, load, run_config

from monoformer_jax import batch as contract
from monoformer_jax.config import MeshConfig
from monoformer_jax.data.documents import build_document
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation.likelihood import Likelihood
from monoformer_jax.models import monoformer
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import make_mesh
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import generate_text

TOKENIZER = ByteTokenizer()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_converted_llama_weights_give_the_recorded_likelihoods():
    """From the logits that PyTorch recorded, for every cut of a text in two."""
    (folder,) = [f for f in FOLDERS if f.kind == "llama"]
    recorded = folder.cases["fwd"]
    model, params = load(folder)
    config = run_config(folder, model)
    whole = [i for i, mask in enumerate(recorded["attention_mask"]) if mask.all()]
    assert whole
    for row in whole:
        ids = recorded["input_ids"][row].tolist()
        tokenizer = IdTokenizer(folder.config)
        tokenizer.bos_id = ids[0]  # the recorded texts begin with any token
        for place, name in enumerate(("pad", "image", "im_start", "im_end")):  # which are ours
            setattr(tokenizer, f"{name}_id", folder.config["vocab_size"] + place)
        sampler = Sampler(config, params, tokenizer)
        cuts = (1, 5, len(ids) - 1)
        found = Likelihood(sampler)([(ids[1:cut], ids[cut:]) for cut in cuts])
        log_p = log_softmax(recorded["logits"][row])
        for cut, (score, greedy) in zip(cuts, found):
            places = range(cut, len(ids))
            want = sum(log_p[place - 1, ids[place]] for place in places)
            assert score == pytest.approx(want, abs=1e-5 * (len(ids) - cut), rel=1e-5)
            assert greedy == all(log_p[p - 1].argmax() == ids[p] for p in places)


@pytest.fixture(scope="module")
def sampler(config):
    data = dataclasses.replace(config.data, max_seq_len=48)
    return Sampler(dataclasses.replace(config, data=data), random_params(config), TOKENIZER)


def direct(sampler, ids):
    """ln p of each token after <s>, of one text without padding."""
    c = sampler.config.model
    document = build_document([], TOKENIZER, sampler.config.layout, closing=ids)
    batch = contract.stack([document], 1 + len(ids), TOKENIZER.pad_id)
    times = np.zeros((1, sampler.config.max_images), np.float32)

    @jax.jit
    def logits_of(params):
        with full_precision(c.dtype):
            out = monoformer.forward(c, params, batch, batch["patches"], times)
            return out.text_hidden[0] @ monoformer.text_head(c, params)

    logits = np.asarray(logits_of(sampler.params))
    logits = logits[:-1, : c.layout.vocab_size].copy()
    logits[:, [0, 3, 4, 5]] = -np.inf  # <pad>, <image>, <|im_start|> and <|im_end|> are not text
    log_p = log_softmax(logits)
    return log_p[np.arange(len(ids)), ids]


def test_a_batch_equals_single_texts_and_a_direct_computation(sampler):
    """Of several lengths, on one device and on four; a context that is too long loses its start."""
    texts = [("two plus", " three is"), ("", "é"), ("x" * 70, "yz")]
    pairs = [tuple(TOKENIZER.encode(text) for text in pair) for pair in texts]
    mesh = make_mesh(MeshConfig())
    on_mesh = dataclasses.replace(
        sampler, mesh=mesh, params=jax.device_put(sampler.params, jax.NamedSharding(mesh, jax.P()))
    )
    single = [Likelihood(sampler, 1)([pair])[0][0] for pair in pairs]
    for found in (Likelihood(sampler, 4)(pairs), Likelihood(on_mesh, 4)(pairs)):
        assert [score for score, _ in found] == pytest.approx(single, rel=1e-5, abs=1e-5)
    for score, (context, continuation) in list(zip(single, pairs))[1:]:
        ids = (context + continuation)[-47:]
        want = direct(sampler, ids)[len(ids) - len(continuation) :].sum()
        assert score == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_what_is_generated_greedily_is_the_likeliest(sampler):
    prompt = "draw"
    (answer,) = generate_text(sampler, [[prompt]], max_tokens=4, allow_images=False)
    ids = list(answer.tokens)[:4]
    assert ids
    other = [ids[0] + 1, *ids[1:]]
    found = Likelihood(sampler)([(TOKENIZER.encode(prompt), x) for x in (ids, other)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_long_texts_are_scored_in_pieces(sampler):
    """Every token once; a piece sees <s> and the token before it."""
    likelihood = Likelihood(sampler)
    short, long = TOKENIZER.encode("one"), TOKENIZER.encode("abc def " * 15)
    pieces = [([], long[:47]), (long[46:47], long[47:93]), (long[92:93], long[93:])]
    want = [likelihood([([], short)])[0][0], sum(score for score, _ in likelihood(pieces))]
    assert likelihood.rolling([short, long]) == pytest.approx(want)
    assert sum(len(x) for _, x in pieces) == len(long)
    for bad in ([], list(range(48))):
        with pytest.raises(InputError, match=r"text 1 has .* tokens to score"):
            likelihood([([], bad)])
