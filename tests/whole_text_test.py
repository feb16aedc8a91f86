"""Texts are encoded and decoded whole, with a tokenizer like LLaMA's, which is not additive."""

import argparse
import copy
import dataclasses
import json
import sys
import time

import jax
import numpy as np
import pytest
from llama_tokenizer import SPACE, write_llama_tokenizer

import monoformer_jax
from monoformer_jax import prepare_data, sample
from monoformer_jax.config import DataConfig
from monoformer_jax.data.documents import EndOfTurn, Image, UntrainedText, open_text
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import digits
from monoformer_jax.models import monoformer
from monoformer_jax.page.conversations import Conversations
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import claim_workdir
from monoformer_jax.sampling import text
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingParams, generate_text
from monoformer_jax.training.loop import _check_first_batch

QUESTION, ANSWER = "hello there, naïve café?", "hi"
PROMPT = "two plus three is"
PICTURE = Image(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1), denoise=False)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """A run on one conversation, with random weights that say words of the vocabulary."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "chat.jsonl").write_text(json.dumps({"data": [QUESTION, ANSWER]}), encoding="utf-8")
    parser = argparse.ArgumentParser()
    prepare_data.add_arguments(parser)
    to = folder / "records"
    arguments = [f"--from={folder / 'chat.jsonl'}", f"--to={to}", "--processes=1"]
    prepare_data.main(parser.parse_args(arguments))
    run = folder / "run"
    run.mkdir()
    vocab = write_llama_tokenizer(run / "tokenizer.json")
    data = DataConfig({"chat": 1.0}, {"chat": str(to)}, tokenizer="tokenizer.json",
                      end_of_prompt=False)  # fmt: skip
    model = dataclasses.replace(config.model, vocab_size=vocab)
    config = dataclasses.replace(config, model=model, data=data)
    tokenizer = monoformer_jax.data.tokenizer.FileTokenizer(run / "tokenizer.json")
    params = monoformer.init(model, jax.random.key(3))
    words = [i for i in range(vocab) if _name(tokenizer, i).startswith(SPACE)]
    said = np.isin(np.arange(model.padded_vocab), [*words, tokenizer.im_start_id])
    claim_workdir(run, config)
    with Checkpoints(run, 1) as checkpoints:
        checkpoints.save_weights(
            {"ema": lambda: params | {"text_head": params["text_head"] * said}}
        )
    return run


def _name(tokenizer, token_id):
    return tokenizer._tokenizer.id_to_token(token_id) or ""


@pytest.fixture(scope="module")
def model(workdir):
    return monoformer_jax.load(workdir)


def trained_prompt(model):
    """The tokens before the first learned one, of a document that training sees."""
    batch = next(Batches(model.config, model.tokenizer).iterator)
    (first,) = np.flatnonzero(batch["target_weights"][0])[:1]
    return batch["tokens"][0, : first + 1].tolist()


def test_every_way_to_a_prompt_gives_the_tokens_of_training(model, workdir, monkeypatch, tmp_path):
    asked, append, prefill = [], Session.append, text.prefill

    def appended(self, parts):
        append(self, parts)
        asked.append(self.document(0)["tokens"].tolist())

    def prefilled(sampler, documents):
        asked.append(documents[0]["tokens"].tolist())
        return prefill(sampler, documents)

    monkeypatch.setattr(Session, "append", appended)
    monkeypatch.setattr(text, "prefill", prefilled)
    user = {"role": "user", "content": QUESTION}
    model.chat([user], max_tokens=1)
    model.chat([user | {"content": [QUESTION[:7], QUESTION[7:]]}], max_tokens=1)
    whole = f"### Human: {QUESTION}### Assistant: "
    model.generate_text([whole], max_tokens=1)
    model.generate_text([[whole[:5], whole[5:]]], max_tokens=1)
    talks = Conversations(model, tmp_path, "")
    talks.say(number := talks.open(None), [QUESTION], max_tokens=1, seed=0, steps=1)
    while talks.view(number).status:
        time.sleep(0.01)
    for options in ((f"--prompt={QUESTION}", "--chat"), (f"--prompt={whole}",)):
        arguments = [f"--workdir={workdir}", "--processes=1", "--max_tokens=1", *options]
        monkeypatch.setattr(sys, "argv", ["sample", *arguments])
        with pytest.raises(SystemExit, match="0"):
            sample.run_command("sample", sample.__doc__, sample.add_arguments, sample.main)
    want = trained_prompt(model)
    names = [_name(model.tokenizer, i) for i in want]
    assert "".join(names) == f"<s>{SPACE}{whole.replace(' ', SPACE)}"
    assert asked == [want] * 7


def test_the_first_batch_is_checked_against_the_vocabulary(model):
    rows = range(model.config.batch_size)
    _check_first_batch(model.config, model.tokenizer, rows)
    understated = copy.copy(model.tokenizer)  # such as one of a library that counts tokens
    understated.vocab_size = 300
    fewer = dataclasses.replace(model.config.model, vocab_size=300)
    with pytest.raises(ValueError, match=r"batch row 0, token \d+: tokens is \d+, but ids of this"):
        _check_first_batch(dataclasses.replace(model.config, model=fewer), understated, rows)


@pytest.mark.parametrize(
    "parts, joined",
    [
        ([PROMPT], True),
        (["two plus", " three is"], True),
        ([PICTURE, "read", " this: "], True),
        ([PROMPT, EndOfTurn()], False),
        (["read this: ", PICTURE], False),
        ([UntrainedText("### Human: hi### Assistant: ")], False),
    ],
)
def test_prompt_and_answer_read_as_one_text(model, parts, joined):
    """An answer that begins a text of its own, as in training, is decoded by itself."""
    got = generate_text(model, [parts], max_tokens=6, allow_images=False)[0]
    prompt = "".join(part for part in parts if isinstance(part, str))
    tokens = model.tokenizer.encode(prompt) if joined else []
    assert open_text(parts, model.tokenizer) == tokens
    assert len(got.tokens) == 6
    before = prompt if joined else ""
    assert before + got.text == model.tokenizer.decode([*tokens, *got.tokens])
    assert got.text.startswith(" ") == joined


def test_a_stop_string_may_begin_with_a_space_and_span_tokens(model):
    free = generate_text(model, [[PROMPT]], max_tokens=8, allow_images=False)[0].text
    words = free.split(" ")
    assert words[0] == "" and len(words) == 9
    for stop in (" " + words[1], f" {words[3]} {words[4]}", f"{words[2]} ", words[5][-1:] + " "):
        params = SamplingParams(stop=("never said", stop))
        got = generate_text(model, [[PROMPT]], max_tokens=8, sampling=params, allow_images=False)[0]
        assert (got.text, got.finish_reason) == (free[: free.index(stop)], "stop")
        kept = model.tokenizer.encode(PROMPT) + got.tokens
        assert (PROMPT + got.text).startswith(model.tokenizer.decode(kept))


def test_a_session_continues_texts_and_previews_them(model):
    session = Session(model, 1)
    session.append([["two"]])
    session.append([[" plus three"]])  # continues the text
    replies = [session.generate_text([3])[0] for _ in range(2)]
    session.append([[" is five"]])
    tokens = session.document(0)["tokens"].tolist()
    said = "two plus three" + replies[0].text + replies[1].text + " is five"
    assert model.tokenizer.decode(tokens) == said
    assert tokens[-2:] == model.tokenizer.encode("is five")
    assert tokens[:4] == [model.tokenizer.bos_id, *model.tokenizer.encode("two plus three")]
    # Text after an image is a text of its own, and a preview shows what the reply will be.
    session.append([[PICTURE]])
    session.append([[" is five"]])
    assert session.document(0)["tokens"].tolist()[-3:] == model.tokenizer.encode(" is five")
    shown = []
    opens, _ = third_is(model, model.tokenizer.im_start_id)
    session = Session(opens, 1, sampling=dataclasses.replace(model.config.sampling, steps=2))
    session.append([[PROMPT]])
    reply = session.generate(
        max_tokens=6, preview=lambda step, rows: shown.append(rows[0]), every=1
    )[0]
    assert isinstance(reply[0], str) and not isinstance(reply[1], str)
    assert reply[0].startswith(" ") and [row[0] for row in shown[:2]] == [reply[0]] * 2


def test_rows_of_the_model_that_have_no_token_are_never_sampled(model):
    """A vocabulary is often padded to a round number."""
    free = generate_text(model, [[PROMPT]], max_tokens=6, allow_images=False)[0].tokens
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.vocab_size = max(free)
    fewer = dataclasses.replace(model, tokenizer=tokenizer)
    got = generate_text(fewer, [[PROMPT]], max_tokens=6, allow_images=False)[0].tokens
    assert len(got) == 6 and max(got) < max(free)


def third_is(model, token):
    """The model with `token` as the third one of its answer to PROMPT or soon after, and the text."""
    free = generate_text(model, [[PROMPT]], max_tokens=6, allow_images=False)[0].tokens
    at = next(i for i in range(2, 6) if free[i] not in free[:i])
    head = model.params["text_head"]
    head = head.at[:, token].set(1.01 * head[:, free[at]])
    whole = model.tokenizer.decode(model.tokenizer.encode(PROMPT) + free[:at])
    changed = dataclasses.replace(model, params=model.params | {"text_head": head})
    return changed, whole.removeprefix(PROMPT)


def test_evaluation_compares_texts(model):
    ends, answer = third_is(model, model.tokenizer.eos_id)
    assert answer.startswith(" ")
    assert digits.exact(ends, [[PROMPT]], [answer]) == 1
    assert digits.exact(ends, [[PROMPT]] * 2, [answer[1:], answer + "!"]) == 0


def test_text_that_is_not_unicode_is_refused_alone(model, workdir, monkeypatch, capsys, tmp_path):
    """A prompt from a terminal in another encoding; the other prompt is answered."""
    arguments = [f"--workdir={workdir}", "--processes=1", "--max_tokens=1"]
    prompts = ["--prompt=caf\udce9", f"--prompt={PROMPT}"]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments, *prompts])
    with pytest.raises(SystemExit) as stopped:
        sample.run_command("sample", sample.__doc__, sample.add_arguments, sample.main)
    said = capsys.readouterr()
    assert stopped.value.code == sample.FAILED_ROWS and f"'{PROMPT}' -> ' " in said.out
    assert "prompt 1, 'caf\\udce9': the prompt is not Unicode text" in said.err
    talks = Conversations(model, tmp_path, "")
    for ask in (
        lambda: model.chat([{"role": "user", "content": "nice \ud83d"}]),
        lambda: model.generate_text("nice \ud83d"),
        lambda: model.generate_images("nice \ud83d"),
        lambda: model.generate_text("nice", stop="nice \ud83d"),
        lambda: talks.say(talks.open(None), ["nice \ud83d"], remember=True, max_tokens=1, seed=0),
    ):
        with pytest.raises(InputError, match="is not Unicode text: character 6"):
            list(ask())
