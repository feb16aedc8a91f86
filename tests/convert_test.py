"""convert: bit-exact round trips, sampling from a converted folder, bad input."""

import fnmatch
import json
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from conftest import REFERENCE, ROOT
from llama_tokenizer import write_llama_tokenizer

import monoformer_jax
from monoformer_jax.data.tokenizer import NEW_SPECIALS, FileTokenizer, extend_tokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.pretrained.conversion import (
    check_safetensors,
    check_workdir,
    find_source,
    open_source,
    write_safetensors_folder,
    write_workdir,
)
from monoformer_jax.pretrained.folder import open_weights
from monoformer_jax.pretrained.model import open_pretrained
from monoformer_jax.pretrained.table import read_tree
from monoformer_jax.runtime.weights import load_trained

VARIANTS = ("tiny_a", "tiny_a_adaln_before_decoder", "tiny_a_noadaln", "tiny_a_mm")


def write_words(path, size, specials):
    """Writes a tokenizer.json of `size` words (<unk>, <s>, </s>, w3, w4, …) and `specials`."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", *specials])
    made.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recorded tiny MonoFormer with a matching tokenizer."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    path.mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(REFERENCE / "tiny_a" / name, path)
    write_words(path / "tokenizer.json", 127, NEW_SPECIALS)
    return path


@pytest.fixture(scope="module")
def workdir(folder):
    to = folder.parent / "workdir"
    run("convert", f"--from={folder}", f"--to={to}", "--check")
    return to


def run(command, *arguments, code=0):
    """Runs a command; returns its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"monoformer_jax.{command}", *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", VARIANTS)
def test_hugging_face_to_workdir_and_back_is_bit_exact(tmp_path, name):
    weights = open_source(find_source(str(REFERENCE / name)))
    write_workdir(tmp_path / "ours", weights)
    check_workdir(tmp_path / "ours", weights)
    again = open_source(find_source(str(tmp_path / "ours")))
    write_safetensors_folder(tmp_path / "theirs", again)
    check_safetensors(tmp_path / "theirs", again)
    want = safetensors.numpy.load_file(REFERENCE / name / "weights.safetensors")
    got = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])
    recorded = json.loads((REFERENCE / name / "config.json").read_text())
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    told = {"image_size", "patch_size", "in_channels", "learn_sigma", "use_pos_embed", "vocab_size",
            "add_pos_embed_each_layer", "decoder_t_embed", "use_adaln_final_layer",
            "use_bi_attn_img_tokens", "tokenizer_max_length", "hidden_size", "image_token_index",
            "num_hidden_layers", "intermediate_size", "rms_norm_eps", "rope_theta"}  # fmt: skip
    assert {key: written[key] for key in told} == {key: recorded[key] for key in told}
    # The config is the same with our key in config.json, and its model also without it.
    assert open_pretrained(tmp_path / "theirs").config == again.config
    del written["monoformer_jax"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(written))
    assert open_pretrained(tmp_path / "theirs").config.model == again.config.model


def test_workdir_to_safetensors_and_back_is_bit_exact(tmp_path, folder):
    """For both the raw and the EMA weights, which differ."""
    shutil.copytree(folder, tmp_path / "source")
    average = safetensors.numpy.load_file(folder / "weights.safetensors")
    (tmp_path / "source" / "ema").mkdir()
    average = {name: value * 0.5 for name, value in average.items()}
    safetensors.numpy.save_file(average, tmp_path / "source" / "ema" / "model.safetensors")
    first = open_source(find_source(str(tmp_path / "source")))
    write_workdir(tmp_path / "ours", first)
    second = open_source(find_source(str(tmp_path / "ours")))
    write_safetensors_folder(tmp_path / "theirs", second)
    third = open_source(find_source(str(tmp_path / "theirs")))
    assert first.config == second.config == third.config
    params, ema = read_tree(first.params), read_tree(first.ema)
    for one in (second, third):
        jax.tree.map(np.testing.assert_array_equal, params, read_tree(one.params))
        jax.tree.map(np.testing.assert_array_equal, ema, read_tree(one.ema))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x * 0.5, params), ema)


def test_bf16(tmp_path, folder):
    weights = open_source(find_source(str(folder)))
    write_safetensors_folder(tmp_path / "small", weights, "bfloat16")
    check_safetensors(tmp_path / "small", weights, "bfloat16")
    assert {t.dtype.name for t in open_weights(tmp_path / "small").values()} == {"bfloat16"}
    again = open_source(find_source(str(tmp_path / "small")))
    trees = read_tree(weights.ema), read_tree(again.ema)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), *trees)


def test_a_llama_gets_new_image_layers_and_special_tokens(tmp_path):
    source = tmp_path / "llama"
    source.mkdir()
    text = "naïve: two plus three is five " * 2
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    count = write_llama_tokenizer(source / "tokenizer.json", specials=(), truncation=cut)
    config = json.loads((REFERENCE / "llama_tiny" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": count}))
    tensors = safetensors.numpy.load_file(REFERENCE / "llama_tiny" / "weights.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (count, tensors[name].shape[1]))
    safetensors.numpy.save_file(tensors, source / "weights.safetensors")
    out = run("convert", f"--from={source}", f"--to={tmp_path / 'ours'}")
    assert "(new)" in out and "model.layers.*.mlp.up_proj.weight" in out
    config, params, _ = load_trained(tmp_path / "ours")
    assert config.model.vocab_size == count + 4
    want = safetensors.numpy.load_file(source / "weights.safetensors")
    table = np.asarray(params["token_embedding"])
    np.testing.assert_array_equal(table[:count], want["model.embed_tokens.weight"])
    assert (table[count : count + 4] != 0).all() and (table[count + 4 :] == 0).all()
    tokenizer = FileTokenizer(tmp_path / "ours" / "tokenizer.json")
    ids = [tokenizer.pad_id, tokenizer.image_id, tokenizer.im_start_id, tokenizer.im_end_id]
    assert ids == [count, count + 1, count + 2, count + 3]
    assert tokenizer.decode(tokenizer.encode(text)) == text  # the stored truncation is reset
    assert max(tokenizer.encode(text)) < count
    # Its objective is the library's, as its image layers are new; starts_test.py trains from it.
    assert config.objective.kind == "rectified_flow" and not config.model.predict_variance


@pytest.mark.slow
def test_sample_from_a_converted_folder(workdir, tmp_path):
    out = run(
        "sample", f"--workdir={workdir}", "--paint", "--prompt=w17 w40", f"--out={tmp_path / 'a.png'}",
        "--steps=3", f"--vae={REFERENCE / 'vae_tiny16'}",
    )  # fmt: skip
    assert "1 picture(s)" in out and (tmp_path / "a.png").stat().st_size > 100
    out = run(
        "sample", f"--workdir={workdir}", "--prompt=w17 w40", "--max_tokens=4",
        f"--out={tmp_path / 'b.png'}", "--steps=3", f"--vae={REFERENCE / 'vae_tiny16'}", "--chat",
    )  # fmt: skip
    model = monoformer_jax.load(workdir, vae=REFERENCE / "vae_tiny16")
    question = [{"role": "user", "content": "w17 w40"}]
    (answer,) = model.chat(question, template=True, max_tokens=4)
    assert out == f"'w17 w40' -> {answer!r}\n" and answer.strip()
    (tmp_path / "labels.json").write_text(json.dumps([f"w{i}" for i in range(1000)]))
    out = run(
        "sample", f"--workdir={workdir}", "--paint", "--prompt=w17", "--steps=3",
        f"--vae={REFERENCE / 'vae_tiny16'}", f"--labels={tmp_path / 'labels.json'}", code=2,
    )  # fmt: skip
    assert "with --labels it must be a class number" in out
    out = run("sample", f"--workdir={workdir}", "--prompt=w1", "--paint", code=2)
    assert "the model generates latents of 4 channels: give its autoencoder with vae=" in out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not llama"),
        ({"decoder_t_embed": "add_at_each_layer"}, "fails in the original code too"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"hidden_size": None}, "config.json"),
        ({"num_hidden_layers": 2}, "9 tensors are missing, unknown or of the wrong shape"),
        ({"vocab_size": 130}, r"lm_head.weight is \[131, 64\], expected \[130, 64\]"),
        ({"use_adaln_final_layer": False}, "missing final_layer.mlp.1.weight"),
    ],
)
def test_an_invalid_folder(tmp_path, folder, change, message):
    shutil.copytree(folder, tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_source(find_source(str(tmp_path / "source")))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["llama_tiny", "tiny_a"])
def test_a_prefix_of_all_names_is_said(tmp_path, name, prefix):
    """As PyTorch saves a compiled or wrapped model; some of each kind of mismatch are listed."""
    shutil.copy(REFERENCE / name / "config.json", tmp_path)
    tensors = safetensors.numpy.load_file(REFERENCE / name / "weights.safetensors")
    tensors = {prefix + key: value for key, value in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"every name begins with '{prefix}', as in") as raised:
        open_source(find_source(str(tmp_path)))
    kinds = [line.split()[0] for line in str(raised.value).split("\n")[1:]]
    assert kinds.count("missing") == kinds.count("unknown") == 8


@pytest.mark.parametrize("ends", [[".safetensors", ".bin"], [".bin"]])
def test_one_set_of_weights_is_downloaded(tmp_path, monkeypatch, ends):
    """From a repository that holds both formats, safetensors alone; the hub is a fake."""
    files = ["config.json", "pytorch_model.bin.index.json", *(f"model{end}" for end in ends)]

    def snapshot_download(name, allow_patterns):
        for file in files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert find_source("someone/model").folder == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files[:2], f"model{ends[0]}"]
    )


def test_bad_input_of_the_command(tmp_path, folder):
    for arguments, message in (
        ([f"--from={tmp_path / 'no'}"], "no is not a folder"),
        ([f"--from={folder}", "--dtype=bf16"], "the parameters of a workdir are float32"),
    ):
        out = run("convert", *arguments, f"--to={tmp_path / 'out'}", code=2)
        assert message in out and out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_lacks_a_special_token(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "source")
    write_words(tmp_path / "source" / "tokenizer.json", 127, NEW_SPECIALS[:3])
    out = run("convert", f"--from={tmp_path / 'source'}", f"--to={tmp_path / 'out'}", code=2)
    assert "lacks the special tokens <|im_end|>" in out
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"is not a readable tokenizer\.json"):
        (tmp_path / "t.json").write_text("{}")
        FileTokenizer(tmp_path / "t.json")


def test_special_tokens_in_user_text_are_not_parsed(tmp_path):
    write_words(tmp_path / "t.json", 20, [])
    extend_tokenizer(tmp_path / "t.json", tmp_path / "more.json")
    tokenizer = FileTokenizer(tmp_path / "more.json")
    assert tokenizer.vocab_size == 24
    assert tokenizer.encode("w3 <|im_end|> w5") == [3, 0, 5]
    assert tokenizer.decode([1, 3, 5, tokenizer.im_start_id]) == "w3 w5"
