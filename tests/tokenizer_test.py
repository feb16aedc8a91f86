"""Tokenizers: whole texts, and the reader of tokenizer.json, with a tokenizer like LLaMA's."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT
from faults_test import bucket  # noqa: F401 - a fixture
from llama_tokenizer import write_llama_tokenizer

from monoformer_jax.config import DataConfig
from monoformer_jax.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    decode_after,
    encode_after,
    extend_tokenizer,
    open_tokenizer,
)
from monoformer_jax.errors import InputError, require_unicode

SENTENCE, END = "two plus three is", " five"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_llama_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=["bytes", "llama"])
def tokenizer(request, file):
    return ByteTokenizer() if request.param == "bytes" else FileTokenizer(file)


def test_the_llama_like_tokenizer_is_not_additive(file):
    llama = FileTokenizer(file)
    whole, pieces = llama.encode(SENTENCE + END), llama.encode(SENTENCE) + llama.encode(END)
    assert whole != pieces and llama.decode(pieces) != SENTENCE + END
    assert llama.decode(whole[-1:]) == "five" and llama.decode(whole) == SENTENCE + END


@pytest.mark.parametrize("text", ["", " ", "  two", "</s> <|im_end|>", "naïve café ☃ 数字\n🐱"])
def test_texts_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == ids  # as sent to other processes
    assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.vocab_size
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_end_id} & set(ids)


def test_a_text_that_continues_another_is_encoded_and_decoded_with_it(tokenizer):
    before, whole = tokenizer.encode(SENTENCE), tokenizer.encode(SENTENCE + END)
    assert encode_after(tokenizer, before, END) == whole[len(before) :]
    assert decode_after(tokenizer, before, whole[len(before) :]) == END
    assert encode_after(tokenizer, [], END) == tokenizer.encode(END)
    assert decode_after(tokenizer, [], tokenizer.encode(END)) == END
    assert decode_after(tokenizer, before, []) == ""
    # `before` ends in the middle of a character.
    ids = tokenizer.encode("a☃b")
    assert decode_after(tokenizer, ids[:-2], ids[-2:]) == "☃b"


def test_text_that_would_change_the_tokens_before_it_is_encoded_alone(file):
    llama = FileTokenizer(file)
    before = llama.encode("fi")
    assert llama.encode("five")[: len(before)] != before
    assert encode_after(llama, before, "ve") == llama.encode("ve")


def test_stored_truncation_and_padding_are_reset(tmp_path, file):
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}  # fmt: skip
    stored = {"truncation": cut, "padding": fill}
    write_llama_tokenizer(tmp_path / "t.json", **stored)
    write_llama_tokenizer(tmp_path / "llama.json", specials=(), **stored)
    extend_tokenizer(tmp_path / "llama.json", tmp_path / "more.json")
    for name in ("t.json", "more.json"):
        for text in ("two", "two plus three is five" * 4):
            ids = FileTokenizer(tmp_path / name).encode(text)
            assert ids == FileTokenizer(file).encode(text)


def with_id(file, to, token, token_id):
    """Writes the tokenizer with another id for a token of the vocabulary."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["vocab"][token] = token_id
    to.write_text(json.dumps(values), encoding="utf-8")


def test_the_size_is_the_highest_id_and_the_model_must_have_it(tmp_path, file):
    count = FileTokenizer(file).vocab_size
    with_id(file, tmp_path / "t.json", "▁five", 500)
    assert FileTokenizer(tmp_path / "t.json").vocab_size == 501
    c = DataConfig(tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=rf"has the id 500, but model.vocab_size is {count}"):
        open_tokenizer(c, tmp_path, count)
    assert open_tokenizer(c, tmp_path, 501).encode("five") == [500]


def test_new_special_tokens_do_not_take_the_id_of_another_token(tmp_path):
    count = write_llama_tokenizer(tmp_path / "llama.json", specials=())
    # An id above the gap is where the next token would go.
    with_id(tmp_path / "llama.json", tmp_path / "gap.json", "▁five", count + 1)
    with pytest.raises(InputError, match=r"cannot be extended: .* would both have the id"):
        extend_tokenizer(tmp_path / "gap.json", tmp_path / "more.json")
    assert not (tmp_path / "more.json").exists()


def test_two_different_tokenizers_are_an_error(tmp_path, file, monkeypatch):
    inside, outside = tmp_path / "run", tmp_path / "here"
    inside.mkdir()
    outside.mkdir()
    monkeypatch.chdir(outside)
    c, text = DataConfig(tokenizer="tokenizer.json"), file.read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"the tokenizer tokenizer\.json does not exist"):
        open_tokenizer(c, inside, 600)
    for folder in (outside, inside):  # one of them, then two that are the same
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        assert open_tokenizer(c, inside, 600).vocab_size == FileTokenizer(file).vocab_size
    with_id(file, outside / "tokenizer.json", "▁five", 500)
    with pytest.raises(InputError, match=r"two different tokenizers, .*run/tokenizer\.json and"):
        open_tokenizer(c, inside, 600)
    (inside / "config.json").touch()  # a run that has its tokenizer
    assert open_tokenizer(c, inside, 600).vocab_size == FileTokenizer(file).vocab_size


def test_a_tokenizer_in_a_bucket(bucket, tmp_path, file):  # noqa: F811
    elsewhere = bucket.parent / "tokenizers" / "t.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    for workdir in (tmp_path, bucket):
        found = open_tokenizer(DataConfig(tokenizer=str(elsewhere)), workdir, 600)
        assert found.encode("naïve") == FileTokenizer(file).encode("naïve")


def test_files_are_utf_8_in_any_locale(tmp_path, file):
    """A program in an ASCII locale reads, extends and writes a tokenizer, and prints."""
    write_llama_tokenizer(tmp_path / "llama.json", specials=())
    program = """
import argparse, locale, sys
from monoformer_jax.cli import run_command
from monoformer_jax.data.tokenizer import FileTokenizer, extend_tokenizer
extend_tokenizer("llama.json", "more.json")
assert locale.getpreferredencoding(False).upper() != "UTF-8"
sys.argv = ["test"]
ids = FileTokenizer("more.json").encode("naïve café")
run_command("test", "", lambda parser: None, lambda args: print(ids, "naïve ☃"))
"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(ROOT)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    ids = FileTokenizer(file).encode("naïve café")
    assert done.stdout == f"{ids} na\\xefve \\u2603\n", done.stderr
    assert FileTokenizer(tmp_path / "more.json").encode("naïve café") == ids


def test_half_a_surrogate_pair_is_not_text():
    require_unicode("naïve 🐱", "the prompt")
    with pytest.raises(InputError, match=r"the prompt is not Unicode text: character 6 of"):
        require_unicode("nice \ud83d", "the prompt")
