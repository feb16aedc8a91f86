"""Mutated files for each reader of files that others made: an InputError or a result, little memory.

    python tests/fuzz_readers.py --mutations=2000 --seed=1        all readers, about a minute
    python tests/fuzz_readers.py torch --mutations=2000           one

hostile_test.py runs 200 mutations of each.
"""

import argparse
import base64
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
from llama_tokenizer import write_llama_tokenizer
from pyarrow import parquet

from monoformer_jax.data import raw
from monoformer_jax.data.content import read_content
from monoformer_jax.data.image_io import MOST_PIXELS, open_image
from monoformer_jax.data.templates import read_labels
from monoformer_jax.data.tokenizer import FileTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.files import read_json
from monoformer_jax.models import base_config, make_config
from monoformer_jax.pretrained import clip, llama, monoformer, sd_vae
from monoformer_jax.pretrained.folder import (
    config_errors,
    open_safetensors,
    open_weights,
    write_safetensors,
)
from monoformer_jax.pretrained.table import Tensor
from monoformer_jax.pretrained.torch_file import open_torch_file

DATA = Path(__file__).parent / "data"
MOST_GROWTH = 100 << 20  # bytes
PICTURES = ("png", "jpeg", "webp", "gif", "tiff", "data URL")
_EXTREMES = [
    0,
    1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
]
_VALUES = [
    None,
    True,
    -1,
    0,
    0.5,
    1e308,
    2**31,
    10**30,
    "",
    "x" * 3000,
    [],
    [[]],
    {},
    {"a": {}},
    "../x",
]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: flipped bytes, an extreme number, a cut, an insertion, a repeated or a removed part."""
    data, kind = bytearray(data), rng.integers(6)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 8)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        width = int(rng.choice([1, 2, 4, 8]))
        order = ["little", "big"][int(rng.integers(2))]
        number = _EXTREMES[int(rng.integers(len(_EXTREMES)))] % 256**width
        data[at : at + width] = number.to_bytes(width, order)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = rng.bytes(length)
    elif kind == 4:
        data[at:at] = data[at : at + length] * int(rng.integers(1, 20))
    else:
        del data[at : at + length]
    return bytes(data)


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """A value replaced, removed or nested deeply; every fourth time bytes, as above."""
    if rng.integers(4) == 0:
        return mutate(data, rng)
    values = json.loads(data)
    node, place = values, None
    while isinstance(node, dict | list) and node and (place is None or rng.integers(3)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, place = node, keys[int(rng.integers(len(keys)))]
        node = node[place]
    choice = int(rng.integers(len(_VALUES) + 2))
    if choice < len(_VALUES):
        parent[place] = _VALUES[choice]
    elif choice == len(_VALUES):
        del parent[place]
    else:
        parent[place] = "DEEP"
        return json.dumps(values).replace('"DEEP"', "[" * 200_000 + "]" * 200_000).encode()
    return json.dumps(values).encode()


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    ramp = np.linspace(0, 255, 24 * 32 * 3).astype(np.uint8).reshape(24, 32, 3)
    PIL.Image.fromarray(ramp).save(file, kind)
    return file.getvalue()


def _safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        arrays = {
            "a": np.arange(12, dtype=np.float32).reshape(3, 4),
            "b": np.zeros((0, 2), np.int64),
        }
        write_safetensors(Path(folder) / "a", {
            name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()
        })  # fmt: skip
        return (Path(folder) / "a").read_bytes()


def _config(name: str) -> bytes:
    return (DATA / "reference" / name / "config.json").read_bytes()


def _load(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.load().shape != tensor.shape:
            raise AssertionError("a tensor is read with another shape than was said")


def _read_index(path: Path) -> None:
    shutil.copy(path, path.parent / "model.safetensors.index.json")
    (path.parent / "model-1.safetensors").write_bytes(_safetensors())
    _load(open_weights(path.parent))


def _tokenizer() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_llama_tokenizer(Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


def _reads_examples(suffix: str) -> Callable[[Path], None]:
    """Reads all examples of a dataset; one that cannot be read may cost itself alone."""

    def run(path: Path) -> None:
        file = path.with_suffix(suffix)
        shutil.copy(path, file)
        raw._read_table.cache_clear()
        for example in raw.open_raw(str(file)):
            with contextlib.suppress(InputError):
                example()

    return run


def _parquet() -> bytes:
    file = io.BytesIO()
    rows = [{"image": {"bytes": b"1", "path": None}, "text": f"a cat {i}"} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _reads_config(read: Callable) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        values = read_json(path)
        with config_errors(path):
            read(values, path)

    return run


INDEX = json.dumps(
    {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
).encode()
URL = b"data:image/png;base64," + base64.b64encode(_picture("PNG"))
EXAMPLES = [
    {"image": "a.png", "captions": ["a cat", "an animal"]},
    {"images": ["a.png", "b.png"], "messages": ["<image> make it red", "<image>"]},
    {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]},
    {"source": "a.png", "instruction": "red", "target": "b.png"},
    {"texts": ["one", None], "images": [None, "a.png"]},
    {"parts": [{"text": "a"}, {"image": "a.png", "generate": True}]},
]
ROWS = json.dumps(EXAMPLES).encode()
LINES = "\n".join(map(json.dumps, EXAMPLES)).encode()
CSV = b'file_name,text\r\n"a.png","a ""cat"""\r\nb.png,a dog\r\n'
# Reader -> (a good file, how it is mutated, what reads it)
READERS = {
    "safetensors": (_safetensors(), mutate, lambda path: _load(open_safetensors(path))),
    "torch": ((DATA / "torch_save.bin").read_bytes(), mutate, lambda p: _load(open_torch_file(p))),
    "torch_old": (
        (DATA / "torch_save_old.bin").read_bytes(), mutate, lambda p: _load(open_torch_file(p)),
    ),
    "index": (INDEX, mutate_json, _read_index),
    "llama": (_config("llama_tiny"), mutate_json, _reads_config(llama.read_config)),
    "monoformer": (_config("tiny_a"), mutate_json, _reads_config(monoformer.read_config)),
    "vae": (_config("vae_tiny16"), mutate_json, _reads_config(sd_vae.read_config)),
    "clip": (_config("clip_tiny"), mutate_json, _reads_config(clip.read_config)),
    "config": (json.dumps(base_config().to_dict()).encode(), mutate_json,
               lambda path: make_config(read_json(path))),
    "labels": (json.dumps([f"class {i}" for i in range(1000)]).encode(), mutate_json, read_labels),
    "tokenizer": (_tokenizer(), mutate_json, lambda p: FileTokenizer(p).encode("draw a seven")),
    "json lines": (LINES, mutate, _reads_examples(".jsonl")),
    "json list": (ROWS, mutate_json, _reads_examples(".json")),
    "csv": (CSV, mutate, _reads_examples(".csv")),
    "parquet": (_parquet(), mutate, _reads_examples(".parquet")),
    "png": (_picture("PNG"), mutate, open_image),
    "jpeg": (_picture("JPEG"), mutate, open_image),
    "webp": (_picture("WEBP"), mutate, open_image),
    "gif": (_picture("GIF"), mutate, open_image),
    "tiff": (_picture("TIFF"), mutate, open_image),
    "data URL": (URL, mutate, lambda p: read_content([p.read_bytes().decode("latin-1")], "a prompt")),
}  # fmt: skip


def failures(name: str, mutations: int, seed: int, folder: Path) -> Iterator[str]:
    """Yields what went wrong: another exception, a long message, or much memory."""
    good, change, read = READERS[name]
    rng, file, reset = np.random.default_rng(seed), folder / "file", Path("/proc/self/clear_refs")
    file.write_bytes(good)
    read(file)  # the good file is read, and modules are loaded
    for number in range(mutations):
        file.write_bytes(change(good, rng))
        reset.write_text("5")  # the peak is now what is in use
        before = _status("VmRSS")
        try:
            read(file)
        except InputError as error:
            if len(str(error)) > 400 or not str(error):
                yield f"{name}, mutation {number}: a message of {len(str(error))} characters"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            yield f"{name}, mutation {number}: {type(error).__name__}: {str(error)[:200]}"
        # A picture may take what the pixels that its header may claim take, with transparency twice.
        most = 8 * MOST_PIXELS if name in PICTURES else MOST_GROWTH
        if (growth := _status("VmHWM") - before) > most:
            yield f"{name}, mutation {number}: {growth >> 20} MiB"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", nargs="*", help=f"of {', '.join(READERS)}; default: all")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    for name in args.reader or READERS:
        with tempfile.TemporaryDirectory() as folder:
            found = list(failures(name, args.mutations, args.seed, Path(folder)))
        wrong += len(found)
        print(f"{name}: {args.mutations} mutations, {len(found)} failures", *found[:10], sep="\n  ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
