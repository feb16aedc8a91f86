"""Files that others made: refused by limits before memory is taken, in one sentence."""

import json
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_readers import DATA, MOST_GROWTH, READERS, failures
from pretrained_test import ORDERED, Build, Call, Global, Storage, tensor, write_bin

from monoformer_jax.data.content import open_source
from monoformer_jax.errors import InputError
from monoformer_jax.files import MOST_JSON, read_json
from monoformer_jax.pretrained import clip, llama, sd_vae
from monoformer_jax.pretrained.folder import load_folder, open_weights
from monoformer_jax.pretrained.model import open_pretrained
from monoformer_jax.pretrained.torch_file import open_torch_file

REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ONES = {"0": np.ones(4, np.float32)}


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name, tmp_path):
    """200 mutations, seeded; `python tests/fuzz_readers.py` runs 2,000."""
    assert not list(failures(name, 200, 0, tmp_path))


def refused(folder, message, read=open_weights):
    with pytest.raises(InputError, match=message) as error:
        read(folder)
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "state",
    [
        tensor("FloatStorage", "0", 4, (2**18, 2**18), (0, 0)),  # would be 256 GiB
        tensor("FloatStorage", "0", 4, (5,), (0,)),
        tensor("FloatStorage", "0", 4, (2**60,), (1,)),
        tensor("FloatStorage", "0", 4, (2, 2), (2,)),
        tensor("FloatStorage", "0", 4, [2, 2], [2, 1]),
        tensor("FloatStorage", "0", 4, (1.5,), (1,)),
        tensor("FloatStorage", "0", 4, (1,) * 40, (1,) * 40),
        Call(REBUILD, (1, 2), 0, (1,), (1,), False, Call(ORDERED)),
    ],
)
def test_a_tensor_that_asks_for_more_than_its_storage(tmp_path, state):
    write_bin(tmp_path / "pytorch_model.bin", {"a": state}, ONES)
    refused(tmp_path, "is damaged: a tensor .* outside its storage")


def test_a_tensor_of_a_storage_that_is_larger_than_the_file(tmp_path):
    for count in (5, 2**40, -1, 1.0, True):
        state = {"a": Call(REBUILD, Storage("FloatStorage", "0", count), 0, (1,), (1,), False)}
        write_bin(tmp_path / "pytorch_model.bin", state, ONES)
        if count is not True:  # which is 1
            refused(tmp_path, "is missing or too short|storage of an unknown type")


def test_a_deflated_archive(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(1 << 24))
    assert path.stat().st_size < 1 << 16
    refused(tmp_path, "is rejected: archive/data.pkl is compressed, or larger than the file")


def test_a_pickle_that_asks_for_memory_or_changes_what_was_checked(tmp_path):
    memo = b"\x80\x02}r\xff\xff\xff\x0f."  # LONG_BINPUT 268,435,455: 2 GiB of memo
    for data, message in (
        (memo, "numbers more objects than it has bytes"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "is damaged and cannot be read"),
        (pickle.dumps([1]), "is not a dict of tensors"),
        (pickle.dumps({"a": 1}), "is not a dict of tensors"),
    ):
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", data)
        refused(tmp_path, message)
    # BUILD sets attributes: here the shape of a tensor, after its check.
    state = {"a": Build(tensor("FloatStorage", "0", 4, (2,), (1,)), {"shape": (2**40,)})}
    write_bin(tmp_path / "pytorch_model.bin", state, ONES)
    refused(tmp_path, "it changes a tensor")


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../other/model.safetensors", "a/b", "", "..", 3, None, ["a"], "x" * 300],
)
def test_an_index_whose_shards_are_elsewhere(tmp_path, shard):
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "lists a shard that is not the name of a file")


def test_json_that_is_large_or_deep(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 1_000_000)
    refused(path, "config.json is not valid JSON .nested too deeply", read_json)
    with path.open("wb") as file:  # sparse
        file.truncate(MOST_JSON + 1)
    refused(path, f"has {MOST_JSON + 1} bytes: a JSON file has at most", read_json)
    path.write_bytes(b"\xff\xfe{}")
    refused(path, "is not valid JSON", read_json)


SIZES = {
    "llama_tiny": "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size",
    "clip_tiny": "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size",
    "vae_tiny16": "in_channels latent_channels layers_per_block norm_num_groups",
}


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_in_a_config(tmp_path, name):
    """Refused by their name, before any array is made."""
    module = {"llama_tiny": llama, "clip_tiny": clip, "vae_tiny16": sd_vae}[name]
    good = json.loads((DATA / "reference" / name / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(READERS["safetensors"][0])
    for key in SIZES[name].split():
        for wrong in (10**12, -1, 0, 2.5, "many", None, [1], True):
            changed = (
                good | {key: wrong} | ({"out_channels": wrong} if key == "in_channels" else {})
            )
            (tmp_path / "config.json").write_text(json.dumps(changed))
            with pytest.raises(InputError, match=key):
                if module is llama:
                    open_pretrained(tmp_path)
                else:
                    load_folder(tmp_path, module.read_config, None, None)


def test_object_arrays_are_not_read(tmp_path):
    """numpy would run the pickle of such a file; open_image takes arrays of numbers alone."""
    for array in (np.array([[1, None]]), np.array([["a"]]), np.zeros((2, 2, 3), complex)):
        refused(
            array, "is neither uint8 nor floats|has shape", lambda x: open_source(x, "the image")
        )


def test_the_limit_is_measured():
    """A reader that takes memory is found by the measure of fuzz_readers."""
    READERS["greedy"] = (b"{}", lambda data, rng: b"{}", lambda path: np.ones(MOST_GROWTH // 4))
    try:
        with tempfile.TemporaryDirectory() as folder:
            assert "MiB" in "".join(failures("greedy", 2, 0, Path(folder)))
    finally:
        del READERS["greedy"]


def test_a_good_file_of_torch_is_still_read():
    assert sorted(open_torch_file(DATA / "torch_save.bin")) == [
        "count", "parameter", "second_half", "transposed",
    ]  # fmt: skip
