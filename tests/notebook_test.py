"""Runs every cell of the notebooks in launch/ on CPU with tiny models."""

import re
import shutil

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import REFERENCE, ROOT
from convert_test import write_words
from PIL import Image

from monoformer_jax.data.tokenizer import NEW_SPECIALS
from monoformer_jax.pretrained.conversion import find_source, open_source, write_workdir
from monoformer_jax.runtime.workdir import read_config

VAE = REFERENCE / "vae_tiny16"


def fill_in(notebook, **values):
    """Sets form fields: lines `NAME = value  # @param ...`, each exactly once."""
    for name, value in values.items():
        count = 0
        for cell in notebook.cells:
            line = rf"^{name} = .*?  # @param"
            cell.source, here = re.subn(
                line, f"{name} = {value!r}  # @param", cell.source, flags=re.M
            )
            count += here
        assert count == 1, f"{count} fields {name}"


def printed(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs)


@pytest.fixture
def run_notebook(monkeypatch):
    """A function that runs a notebook with the given form fields and returns its code cells."""
    monkeypatch.setenv("MONOFORMER_SKIP_INSTALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(name, **fields):
        notebook = nbformat.read(ROOT / "launch" / name, as_version=4)
        fill_in(notebook, **fields)
        nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
        ).execute()  # raises if a cell raises
        (ROOT / "showcase.png").unlink(missing_ok=True)  # the first cell of each draws it
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


@pytest.mark.slow
def test_digits_notebook(tmp_path, run_notebook):
    picture = tmp_path / "picture.png"  # after 20 steps the model may generate no image
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(picture)
    install, train, draw, read = run_notebook(
        "colab_digits.ipynb", SIZE="tiny", STEPS=20, WORKDIR=str(tmp_path), PICTURE=str(picture)
    )
    assert "No TPU or GPU here" in printed(install)
    assert "step" in printed(train) and (tmp_path / "metrics.jsonl").is_file()
    assert (tmp_path / "checkpoints" / "20").is_dir()
    assert "draw a seven" in printed(draw) and "two plus three is" in printed(draw)
    assert "read this: " in printed(read)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of tiny weights with the layout of the released checkpoint."""
    folder = tmp_path_factory.mktemp("hub") / "weights"
    folder.mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(REFERENCE / "tiny_a" / name, folder)
    write_words(folder / "tokenizer.json", 127, NEW_SPECIALS)
    return folder


def pictures(cell) -> int:
    return sum("image/png" in out.get("data", {}) for out in cell.outputs)


@pytest.mark.slow
def test_imagenet_notebook(tmp_path, run_notebook, weights):
    *_, convert, paint = run_notebook(
        "colab_imagenet.ipynb", WEIGHTS=str(weights), AUTOENCODER=str(VAE),
        WORKDIR=str(tmp_path / "imagenet"), CLASSES="w17, w40", STEPS=2,
    )  # fmt: skip
    assert "read again and equal" in printed(convert)
    assert "Please generate an image of w40." in printed(paint) and pictures(paint) == 2


@pytest.mark.slow
def test_pictures_notebook(tmp_path, run_notebook):
    """Eight pictures of 8×8, and a model of one layer."""
    _, prepare, train, draw = run_notebook(
        "colab_pictures.ipynb", PICTURES=str(tmp_path / "pictures"), IMAGE_SIZE=8, STEPS=4,
        RECORDS=str(tmp_path / "records"), WORKDIR=str(tmp_path / "run"), SAMPLING_STEPS=2,
        OVERRIDES="--config.model.num_layers=1 --config.batch_size=4 --config.log_every=2",
    )  # fmt: skip
    assert "8 examples" in printed(prepare) and "step 4/4" in printed(train)
    assert "'a blue square' -> '[picture 2]'" in printed(draw) and pictures(draw) == 1
    assert read_config(tmp_path / "run").data.image_size == 8


@pytest.mark.slow
def test_finetune_notebook(tmp_path, run_notebook, weights):
    base = tmp_path / "base"
    write_workdir(base, open_source(find_source(str(weights))))
    _, plan, _, encode, train, paint = run_notebook(
        "colab_finetune.ipynb", PLAN_CONFIG=f"configs/finetune.py:{base}", BASE=str(base),
        AUTOENCODER=str(VAE), PICTURES=str(tmp_path / "pictures"), RECORDS=str(tmp_path / "records"),
        IMAGE_SIZE=2 * read_config(base).data.image_size, STEPS=2, BATCH_SIZE=2, RANK=2,
        WORKDIR=str(tmp_path / "run"), SAMPLING_STEPS=2,
    )  # fmt: skip
    assert "memory of a device" in printed(plan) and "8 examples" in printed(encode)
    assert "step 2/2" in printed(train) and pictures(paint) == 2
