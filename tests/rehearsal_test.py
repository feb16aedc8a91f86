"""Rehearsal: the commands in the docstrings of the shipped configs, word for word and in order, and
those of the pages of docs/ that need weights or data.

Each runs as a process in a folder with the files that it names, tiny, in the true form on disk: a LLaMA
and a MonoFormer with a tokenizer.json, an autoencoder, ImageNet's class folders, and the files of
JourneyDB, UltraChat and LLaVA. `SMALLER` is all that is added. `train` runs in two processes, which are
killed, and is resumed by two or by one.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from conftest import REFERENCE, ROOT
from llama_tokenizer import write_llama_tokenizer
from multiprocess_test import QUICK, TIMEOUT, free_port

import monoformer_jax
from monoformer_jax.data.records import Records
from monoformer_jax.data.tokenizer import NEW_SPECIALS
from monoformer_jax.pretrained.conversion import find_source, open_source
from monoformer_jax.pretrained.table import read_tree
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.runtime.workdir import read_config

pytestmark = pytest.mark.slow

PREPARE = "prepare_data"
STEPS, SAVED = 16, 4
VOCAB = 403  # of the tokenizer of `llama_tokenizer`
# Appended to the commands: the sizes of the recorded tiny models, whose weights the runs start from.
SMALLER = {
    "train": [
        "--config.model.num_layers=3", "--config.model.embed_dim=64", "--config.model.num_heads=4",
        "--config.model.num_kv_heads=2", "--config.model.head_dim=16", "--config.model.mlp_dim=176",
        f"--config.model.vocab_size={VOCAB}", "--config.model.norm_eps=1e-5",
        "--config.model.dtype=float32", "--config.data.image_size=8",
        "--config.data.max_seq_len=128", "--config.data.streams=2", "--config.batch_size=4",
        f"--config.steps={STEPS}", f"--config.checkpoint_every={SAVED}", "--config.log_every=1",
        "--config.sampling.steps=2",
        # The same in all: the runs of the paper then share their compiled programs.
        "--config.optimizer.learning_rate=1e-4",
    ],
    PREPARE: ["--image_size=16"],
}  # fmt: skip


def commands(name):
    """[(command, arguments)] of the docstring of a config."""
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    lines = re.sub(r"\\\\\n\s*", "", text).splitlines()
    found = [re.fullmatch(r"    python -m monoformer_jax\.(\w+) (.+)", line) for line in lines]
    return [(match[1], shlex.split(match[2])) for match in found if match]


def page_commands(name):
    """[(command, arguments)] of the blocks of a page that docs_test.py does not run."""
    text = (ROOT / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"<!-- not run here: needs [^\n]*-->\n```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    found = [re.fullmatch(r"python -m monoformer_jax\.(\w+) (.+)", line) for line in lines]
    return [(match[1], shlex.split(match[2])) for match in found]


def write_model(folder, name, specials):
    """A recorded tiny model with the vocabulary of the tokenizer."""
    folder.mkdir()
    size = write_llama_tokenizer(folder / "tokenizer.json", specials)
    config = json.loads((REFERENCE / name / "config.json").read_text())
    if specials:
        config["image_token_index"] = size - 3
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    tensors = safetensors.numpy.load_file(REFERENCE / name / "weights.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = np.resize(tensors[key], (size, tensors[key].shape[1]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def write_pictures(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5, 6, 3), np.uint8)
        PIL.Image.fromarray(pixels).resize((24, 20)).save(folder / name, format="JPEG")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder):
    """The files that the commands name, with 12 examples each."""
    classes = [f"n{1440764 + 11 * i:08d}" for i in range(1000)]
    for name in classes:
        (folder / "imagenet" / "train" / name).mkdir(parents=True)
        (folder / "imagenet" / "val" / name).mkdir(parents=True)
    pictures = [f"{name}/{name}_{i}.JPEG" for i, name in enumerate(classes[::90])]
    for split in ("train", "val"):
        write_pictures(folder / "imagenet" / split, pictures)
    (folder / "labels.json").write_text(json.dumps([f"thing {i}" for i in range(1000)]))

    pictures = [f"./{i // 6:03d}/{i:08d}.jpg" for i in range(12)]
    write_pictures(folder / "journeydb", pictures)
    rows = [
        {"img_path": name, "prompt": f"a thing, number {i} --v 4", "Task2": {"Caption": "a thing"}}
        for i, name in enumerate(pictures)
    ]
    for name in ("train_anno_realease_repath", "valid_anno_repath"):
        write_lines(folder / "journeydb" / f"{name}.jsonl", rows)

    # Some are longer than a row of 128 tokens.
    talk = ["What is it?", "It is one.", "And two?", "Two plus three is five."]
    rows = [{"id": str(i), "data": talk * (1 + i % 5)} for i in range(12)]
    write_lines(folder / "ultrachat" / "train_0.jsonl", rows)

    rows = []
    for i in range(12):
        asked = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "one"},
                 {"from": "human", "value": "Really?"}, {"from": "gpt", "value": "two"}]  # fmt: skip
        rows.append(
            {"id": f"{i:012d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": asked}
        )
    write_pictures(folder / "llava", [row["image"] for row in rows])
    asked = [{"from": "human", "value": "Count."}, {"from": "gpt", "value": "one two three"}]
    rows.append({"id": "wgByO4Y_0", "model": "", "conversations": asked})
    (folder / "llava" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))

    rows = [{"image": f"{i}.jpg", "captions": ["a red chair", f"chair {i}"]} for i in range(40)]
    write_pictures(folder / "pictures", [row["image"] for row in rows])
    write_lines(folder / "pictures" / "captions.jsonl", rows)
    for i in range(40):
        (folder / "pictures" / f"{i}.txt").write_text(f"chair {i}\n")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which all commands find what they name."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_model(folder / "TinyLlama-1.1B-Chat-v1.0", "llama_tiny", ())
    write_model(folder / "MonoFormer_ImageNet_256", "tiny_a", NEW_SPECIALS)
    shutil.copytree(REFERENCE / "vae_tiny16", folder / "sd-vae-ft-mse")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def done():
    """Commands that have run; those that two configs share run once."""
    return set()


def start(folder, command, arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", f"monoformer_jax.{command}", *arguments, *SMALLER.get(command, [])],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(processes):
    """Waits for the processes to succeed; returns what the first printed."""
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(said), said
    return said[0][0]


def train(folder, arguments, resumed_by):
    """Two processes, killed after the first checkpoint, and others that resume it."""
    workdir = folder / option(arguments, "--workdir")
    with free_port() as port:
        processes = start_training(folder, arguments, 2, port)
        try:
            while not (workdir / "checkpoints" / str(SAVED)).is_dir():
                assert all(process.poll() is None for process in processes), finish(processes)
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
        for process in processes:
            process.communicate()
        assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
        said = finish(start_training(folder, arguments, resumed_by, port))
    assert int(re.search(r"from step (\d+) to", said)[1]) in range(SAVED, STEPS, SAVED)
    assert json.loads((workdir / "done.json").read_text())["step"] == STEPS
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    return lines


def start_training(folder, arguments, count, port):
    if count == 1:
        return [start(folder, "train", [*arguments, "--processes=1"])]
    together = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [
        start(folder, "train", [*arguments, *together, f"--process={i}"], XLA_FLAGS=QUICK)
        for i in range(count)
    ]


def option(arguments, name):
    """The value of an option, or None."""
    return next((x.partition("=")[2] for x in arguments if x.startswith(f"{name}=")), None)


@pytest.mark.parametrize(
    "name", ["imagenet256", "journeydb_ultrachat", "llava_journeydb", "finetune", "digits"]
)
def test_the_commands_of_a_config(name, checkout, done):
    ran = []
    for command, arguments in commands(name):
        ran.append(command)
        if (command, *arguments) in done:
            continue
        to = checkout / (option(arguments, "--to") or option(arguments, "--out") or "")
        if command == "train":
            lines = train(checkout, arguments, 2 if name == "imagenet256" else 1)
            assert (lines[-1]["cut_documents"] > 0) == (name == "journeydb_ultrachat")
            if option(arguments, "--config.init_from"):
                check_start(checkout, arguments)
            done.add((command, *arguments))
            continue
        said = finish([start(checkout, command, arguments)])
        if command == PREPARE:
            assert len(Records(str(to))) >= 12 and "skipped" not in said
        if command == "sample":
            assert np.asarray(PIL.Image.open(to)).std() > 0
        if command == "evaluate":
            assert re.search(r"image +\d+\.\d+ +loss of held-out|draw +\d+\.\d%", said)
        if to == checkout / "export":
            check_export(to, checkout / option(arguments, "--from"))
            shutil.rmtree(to)  # the next config writes its own
        else:
            done.add((command, *arguments))
    assert ran.count("train") == 1 and {"sample", "evaluate", "convert"} <= set(ran)


@pytest.mark.parametrize("name", ["fine-tuning", "weights", "your-data"])
def test_the_commands_of_a_page(name, checkout, done):
    """What the configs and other pages have run already is not repeated."""
    given = page_commands(name)
    assert given
    for command, arguments in given:
        if (command, *arguments) not in done:
            single = ["--processes=1"] if command == "train" else []
            finish([start(checkout, command, [*arguments, *single])])
            done.add((command, *arguments))
        if out := option(arguments, "--out"):
            assert np.asarray(PIL.Image.open(checkout / out)).std() > 0


def check_start(folder, arguments):
    """The run began with the weights of init_from, and keeps its tokenizer."""
    base, workdir = (folder / option(arguments, f"--{x}") for x in ("config.init_from", "workdir"))
    before, after = (load_trained(path)[1] for path in (base, workdir))
    for name in ("token_embedding", "decoder", "text_head"):
        for a, b in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name])):
            # Adam moves a value by about the learning rate in each step.
            assert 0 < np.abs(np.subtract(a, b)).max() < 2e-4 * STEPS
    assert (workdir / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()


def real_tokens(params):
    """Without the rows that pad the vocabulary, which the original's format does not have."""
    embedding, head = params["token_embedding"], params["text_head"]
    return params | {"token_embedding": embedding[:VOCAB], "text_head": head[:, :VOCAB]}


def check_export(export, workdir):
    """The original's format, as the recorded fixtures are read, has the numbers of the run."""
    ours = monoformer_jax.load(
        workdir, vae=None if "digits" in str(workdir) else REFERENCE / "vae_tiny16"
    )
    theirs = read_tree(open_source(find_source(str(export))).ema)
    images = [
        dataclasses.replace(ours, params=params).generate_images(["one"], seed=3, output="numpy")
        for params in (ours.params, theirs)
    ]
    np.testing.assert_array_equal(*images)
    jax.tree.map(np.testing.assert_array_equal, real_tokens(ours.params), real_tokens(theirs))
    assert (export / "tokenizer.json").exists() == (read_config(workdir).data.tokenizer != "bytes")
