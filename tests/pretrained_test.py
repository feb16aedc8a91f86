"""Reading weights: every supported folder layout, and every kind of damage."""

import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

from monoformer_jax.errors import InputError
from monoformer_jax.files import atomic_folder
from monoformer_jax.pretrained.folder import open_weights, write_safetensors
from monoformer_jax.pretrained.table import (
    Entry,
    Tensor,
    open_tree,
    read_tree,
    transpose,
    write_tensors,
)
from monoformer_jax.pretrained.torch_file import open_torch_file

DATA = ROOT / "tests" / "data"

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "step": np.array(7, np.int64),
}


def described(arrays):
    return {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}


def loaded(folder):
    return {name: tensor.load() for name, tensor in open_weights(folder).items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name])


def test_our_safetensors_are_read_by_the_safetensors_library(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", described(ARRAYS))
    assert_equal(safetensors.numpy.load_file(tmp_path / "model.safetensors"), ARRAYS)
    assert_equal(loaded(tmp_path), ARRAYS)


@pytest.mark.parametrize(
    "other",
    ["pytorch_model.bin", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors"],
)
def test_two_sets_of_weights_are_an_error(tmp_path, other):
    write_safetensors(tmp_path / "model.safetensors", described(ARRAYS))
    where = dict.fromkeys(ARRAYS, "model-1.safetensors")
    (tmp_path / other).write_text(json.dumps({"weight_map": where}))
    if other.endswith(".index.json"):
        assert_equal(loaded(tmp_path), ARRAYS)  # downloaded without its shards
        write_safetensors(tmp_path / "model-1.safetensors", described(ARRAYS))
    with pytest.raises(InputError, match="has more than one set of weights, ") as raised:
        open_weights(tmp_path)
    assert other in str(raised.value) and "model.safetensors" in str(raised.value)
    (tmp_path / other).unlink()
    assert_equal(loaded(tmp_path), ARRAYS)


def test_shards(tmp_path):
    where = {}
    for number, name in enumerate(ARRAYS):
        where[name] = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: ARRAYS[name]}, tmp_path / where[name])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_equal(loaded(tmp_path), ARRAYS)
    index.write_text(json.dumps({"weight_map": where | {"lost": "model-0.safetensors"}}))
    with pytest.raises(InputError, match="lists tensors that their shard lacks: lost"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks shards listed in .*: model-1\.safetensors"):
        open_weights(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        open_weights(tmp_path)


@pytest.mark.parametrize("cut", [3, 60, -1])
def test_truncated_safetensors(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, described(ARRAYS))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        open_weights(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match="has no weights"):
        open_weights(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        open_weights(tmp_path / "nowhere")


class Global:
    """Pickled as a reference to module.name."""

    def __init__(self, module, name):
        self.where = (module, name)


class _Pickler(pickle._Pickler):
    """Writes the pickles of torch.save, and malicious ones, without torch."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.where[0]}\n{obj.where[1]}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Build):
            self.save(obj.made)
            self.save(obj.state)
            self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, Storage) else None


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Build:
    """Pickled as an object whose state is set after it was made."""

    def __init__(self, made, state):
        self.made, self.state = made, state


class Storage:
    def __init__(self, kind, key, count):
        self.identity = ("storage", Global("torch", kind), key, "cpu", count)


ORDERED = Global("collections", "OrderedDict")


def tensor(kind, key, count, shape, strides, offset=0):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, Storage(kind, key, count), offset, shape, strides, False, Call(ORDERED))


def write_bin(path, state, storages):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(state)
        archive.writestr("archive/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())


def test_a_bin_with_shared_and_strided_storages(tmp_path):
    values = np.arange(12, dtype=np.float32)
    half = np.arange(3).astype(ml_dtypes.bfloat16)
    state = {
        "whole": tensor("FloatStorage", "0", 12, (3, 4), (4, 1)),
        "transposed": tensor("FloatStorage", "0", 12, (4, 2), (1, 4), offset=4),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"),
            tensor("BFloat16Storage", "1", 3, (3,), (1,)), True, Call(ORDERED),
        ),
        "scalar": tensor("FloatStorage", "0", 12, (), (), offset=5),
    }  # fmt: skip
    write_bin(tmp_path / "pytorch_model.bin", state, {"0": values, "1": half})
    want = {
        "whole": values.reshape(3, 4),
        "transposed": values[4:].reshape(2, 4).T,
        "parameter": half,
        "scalar": values[5],
    }
    assert_equal(loaded(tmp_path), want)


@pytest.mark.parametrize("name", ["torch_save.bin", "torch_save_old.bin"])
def test_a_bin_saved_by_torch(name, tmp_path):
    """From torch.save: a transposed view, a bfloat16 Parameter, half of a storage.

    By torch 2.13, and by torch 2.14 in the format of torch before 1.6.
    """
    values = np.arange(12, dtype=np.float32)
    want = {
        "transposed": values.reshape(3, 4).T,
        "parameter": np.array([0.5, -2.0, 3.0], ml_dtypes.bfloat16),
        "second_half": values[6:],
        "count": np.array(7),
    }
    assert_equal({k: v.load() for k, v in open_torch_file(DATA / name).items()}, want)
    for end in (-1, -30, 200, 20):
        (tmp_path / "cut.bin").write_bytes((DATA / name).read_bytes()[:end])
        with pytest.raises(InputError, match=r"cut\.bin is damaged"):
            open_torch_file(tmp_path / "cut.bin")


def test_an_old_bin_with_code_is_rejected_without_running_it(tmp_path):
    planted = tmp_path / "planted"
    whole = (DATA / "torch_save_old.bin").read_bytes()
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = pickle.dumps({"little_endian": True}, 2)
    assert whole.startswith(start)
    code = io.BytesIO()
    _Pickler(code, protocol=2).dump({"b": Call(Global("os", "system"), f"touch {planted}")})
    for pickles in (start + system + code.getvalue(), start + code.getvalue()):
        (tmp_path / "old.bin").write_bytes(pickles)
        with pytest.raises(InputError, match=r"its pickle refers to os\.system"):
            open_torch_file(tmp_path / "old.bin")
    assert not planted.exists()


@pytest.mark.parametrize("module, name", [("os", "system"), ("posix", "system"),
                                          ("builtins", "eval"), ("builtins", "getattr"),
                                          ("torch", "load"), ("numpy", "load"),
                                          ("monoformer_jax.cli", "run_command")])  # fmt: skip
def test_a_bin_with_code_is_rejected_without_running_it(tmp_path, module, name):
    planted = tmp_path / "planted"
    state = {
        "a": tensor("FloatStorage", "0", 1, (1,), (1,)),
        "b": Call(Global(module, name), f"touch {planted}"),
    }
    write_bin(tmp_path / "pytorch_model.bin", state, {"0": np.zeros(1, np.float32)})
    with pytest.raises(InputError, match=f"is rejected: its pickle refers to {module}.{name}"):
        open_weights(tmp_path)
    assert not planted.exists()


def test_python_s_unpickler_runs_the_payload(tmp_path):
    """Shows that the test above is meaningful: pickle.load runs the code in such a file."""
    planted = tmp_path / "planted"
    with open(tmp_path / "data.pkl", "wb") as file:
        _Pickler(file, protocol=2).dump({"b": Call(Global("os", "system"), f"touch {planted}")})
    with open(tmp_path / "data.pkl", "rb") as file:
        pickle.load(file)
    assert planted.exists()


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a": tensor("FloatStorage", "0", 4, (3, 2), (2, 1))}, "reaches outside its storage"),
        ({"a": tensor("FloatStorage", "0", 4, (2,), (-1,), 1)}, "reaches outside its storage"),
        ({"a": tensor("FloatStorage", "0", 8, (8,), (1,))}, "data/0 is missing or too short"),
        ({"a": tensor("FloatStorage", "9", 4, (4,), (1,))}, "data/9 is missing or too short"),
        ({"a": 3}, "is not a dict of tensors"),
        ({"a": Call(Global("torch", "FloatStorage"), 3)}, "is damaged and cannot be read"),
    ],
)
def test_a_damaged_bin(tmp_path, state, message):
    path = tmp_path / "pytorch_model.bin"
    write_bin(path, state, {"0": np.zeros(4, np.float32)})
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path)


def test_a_truncated_bin(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_bin(path, {"a": tensor("FloatStorage", "0", 4, (4,), (1,))}, {"0": np.zeros(4, "f4")})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged"):
        open_weights(tmp_path)


TABLE = [
    Entry("stack/w", "layers.{}.w", transpose, transpose),
    Entry("bias", "bias", alias="beta"),
]
TARGET = {"stack": {"w": np.zeros((2, 3, 4), np.float32)}, "bias": np.zeros(5, np.float32)}


def test_a_table_reads_and_writes_back():
    rng = np.random.default_rng(0)
    theirs = {f"layers.{i}.w": rng.normal(size=(4, 3)).astype(np.float32) for i in range(2)}
    theirs["beta"] = rng.normal(size=5).astype(np.float32)
    params = read_tree(open_tree(TABLE, described(theirs), TARGET))
    np.testing.assert_array_equal(params["stack"]["w"][1], theirs["layers.1.w"].T)
    theirs["bias"] = theirs.pop("beta")
    back = write_tensors(TABLE, params, np.dtype(np.float32))
    assert_equal({name: tensor.load() for name, tensor in back.items()}, theirs)


def test_every_mismatch_is_in_one_error():
    theirs = {"layers.0.w": np.zeros((4, 3)), "layers.1.w": np.zeros((3, 4)), "extra": np.zeros(2),
              "old.buffer": np.zeros(1)}  # fmt: skip
    with pytest.raises(InputError) as error:
        open_tree(TABLE, described(theirs), TARGET, ignored=r"old\..*", source="here")
    lines = str(error.value).split("\n")
    assert "here does not match the model: 3 tensors" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == [
        "layers.1.w is [3, 4], expected [4, 3] (parameter stack/w)",
        "missing bias [5] (parameter bias)",
        "unknown extra [2]",
    ]


def test_a_folder_is_created_atomically(tmp_path):
    with atomic_folder(tmp_path / "good") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "good").exists()
    assert (tmp_path / "good" / "x").read_text() == "1"
    with pytest.raises(InputError, match="good already exists"), atomic_folder(tmp_path / "good"):
        raise AssertionError("not reached")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "bad") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["good"]


def test_a_full_disk(tmp_path):
    """Writing to /dev/full fails as on a full disk."""
    with (
        pytest.raises(InputError, match=r"could not be written .*No space left.*no partial output"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "model.safetensors").symlink_to("/dev/full")
        write_safetensors(folder / "model.safetensors", described(ARRAYS))
    assert not list(tmp_path.iterdir())
