"""Exported models, the model that comes with the package, and the cache of compiled programs."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from etils import epath
from fixtures import run

import monoformer_jax
from monoformer_jax import convert, evaluate
from monoformer_jax.data.emoji import emoji
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import digits as digit_figures
from monoformer_jax.evaluation import emoji as emoji_figures
from monoformer_jax.evaluation.retrieval import judge, judge_names
from monoformer_jax.models import monoformer
from monoformer_jax.runtime import compile_cache, workdir
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import claim_workdir


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    """A run with random weights, and its export in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    claim_workdir(folder / "run", config)
    params = monoformer.init(config.model, jax.random.key(3))
    size = config.model.vocab_size  # the padding of the vocabulary is not exported
    params["token_embedding"] = params["token_embedding"].at[size:].set(0)
    params["text_head"] = params["text_head"].at[:, size:].set(0)
    with Checkpoints(folder / "run", 1) as checkpoints:
        checkpoints.save_weights({"ema": lambda: params})
    run(convert, f"--from={folder / 'run'}", f"--to={folder / 'made'}", "--dtype=bf16",
        "--format=safetensors")  # fmt: skip
    return folder / "made"


def test_an_exported_model_is_loaded_as_the_run_is(exported):
    made = monoformer_jax.load(exported)
    assert made.config == monoformer_jax.load(exported.parent / "run").config
    rounded = monoformer_jax.load(exported.parent / "run", dtype="bfloat16")
    for got, want in zip(*map(jax.tree.leaves, (made.params, rounded.params)), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, np.asarray(want, np.float32))
    with pytest.raises(InputError, match="one set of weights: leave out checkpoint"):
        monoformer_jax.load(exported, checkpoint=3)


def test_weights_of_another_program_are_not_taken_for_ours(exported, tmp_path):
    other = shutil.copytree(exported, tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    del values[workdir.EXPORTED]
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError):
        monoformer_jax.load(other)


def test_a_model_of_the_package_is_found_by_its_name(exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "shipped" / "small")
    monkeypatch.setattr(workdir, "SHIPPED", epath.Path(tmp_path / "shipped"))
    monkeypatch.chdir(tmp_path)
    assert monoformer_jax.load("small").config == monoformer_jax.load(exported).config
    with pytest.raises(InputError, match=r"no such folder, and no model of that name .*\(small\)"):
        monoformer_jax.load("smal")
    (tmp_path / "small").mkdir()  # a folder of the user precedes
    with pytest.raises(InputError, match=r"small holds no trained model: it has no config\.json"):
        monoformer_jax.load("small")


def test_figures_are_not_written_into_the_package():
    with pytest.raises(InputError, match="is part of the package: give a folder of figures, --out"):
        run(evaluate, f"--workdir={workdir.SHIPPED / 'showcase'}")


@pytest.mark.parametrize("given", ["default", "moved", "off", "unwritable", "jax"])
def test_where_compiled_programs_are_kept(tmp_path, monkeypatch, given):
    """Environment variables, and a folder that cannot be made."""
    changed = {}
    settings = SimpleNamespace(
        jax_compilation_cache_dir=str(tmp_path) if given == "jax" else None,
        update=lambda name, value: changed.update({name: value}),
    )
    monkeypatch.setattr(compile_cache, "jax", SimpleNamespace(config=settings))
    (tmp_path / "file").touch()
    home = tmp_path / "file" if given == "unwritable" else tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    value = {"moved": str(tmp_path / "a" / "b"), "off": "off"}.get(given)
    if value:
        monkeypatch.setenv(compile_cache.VARIABLE, value)
    else:
        monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    want = {"default": tmp_path / "monoformer_jax", "moved": tmp_path / "a" / "b"}.get(given)
    assert compile_cache.use_compile_cache() == want
    assert changed.get("jax_compilation_cache_dir") == (want and str(want))
    assert want is None or want.is_dir()


SHOWCASE = ROOT / "monoformer_jax" / "shipped" / "showcase"
SCORES = json.loads((SHOWCASE / "scores.json").read_text())


def test_the_model_card_says_what_was_measured():
    card = (SHOWCASE / "README.md").read_text()
    said = re.findall(r"([\d.]+)( %|) <!-- measure: (\w+) -->", card)
    assert {name for *_, name in said} >= {
        "draw_accuracy", "frechet", "read_accuracy", "say_accuracy", "heldout_both_right",
        "memorised_share", "train_top1", "heldout_names_exact", "heldout_pixel_error",
    }  # fmt: skip
    for figure, percent, name in said:
        digits = len(figure.partition(".")[2])
        want = 100 * SCORES[name] if percent else SCORES[name]
        assert figure == f"{want:.{digits}f}", name
    assert "CC BY-SA 4.0" in card


def test_the_shipped_files_are_small_and_of_no_machine():
    files = {path.name: path for path in SHOWCASE.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "scores.json"}
    assert sum(path.stat().st_size for path in files.values()) <= 4e6
    for name in ("config.json", "scores.json"):
        assert not re.search(r'"/|://', files[name].read_text()), name


@pytest.fixture
def optimized():
    """conftest disables most XLA optimizations, which here take less time than they save."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("optimized")
def test_the_shipped_weights_have_the_figures_of_the_model_card():
    """Within one picture or one point; drawn with seed 0: 100 digits and the held-out captions."""
    model = monoformer_jax.load("showcase")
    figures = model.config.data.emoji_subset, model.config.data.image_size
    known = emoji_figures.captioned_set(emoji(*figures, model.config.data.emoji_split))
    held_out = np.flatnonzero(~known.trained)
    got = judge(known, emoji_figures.draw(model, known, held_out, 0), held_out)
    got |= judge_names(known, emoji_figures.name(model, known, held_out), held_out)
    close = max(1 / len(held_out), 0.01) + 1e-6
    for name in ("both_right", "top1", "names_exact"):
        assert abs(got[name] - SCORES[f"heldout_{name}"]) < close, name
    assert abs(got["memorised_share"] - SCORES["memorised_share"]) < close
    assert abs(got["pixel_error"] - SCORES["heldout_pixel_error"]) < 0.01

    labels = np.tile(np.arange(10), 10)
    drawn = digit_figures.draw(model, labels, model.config.sampling.guidance, 0)
    got = {
        "draw_accuracy": digit_figures.draw_accuracy(drawn, labels),
        "read_accuracy": digit_figures.read_accuracy(model),
        "say_accuracy": digit_figures.say_accuracy(model),
    }
    for name, value in got.items():
        assert abs(value - SCORES[name]) < 0.01 + 1e-6, name


@pytest.mark.slow
def test_what_a_wheel_installs_draws_reads_and_talks_in_an_empty_folder(tmp_path, installed):
    """The first lines of README."""
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```bash\n(.*?)```", readme, re.S)[1].splitlines()[-1]
    reads = re.search(r"python (.*--image=seven.png)  # seven", readme)[1]
    env = os.environ | {"PYTHONPATH": str(installed)}

    def command(words):
        done = subprocess.run(["bash", "-c", words.replace("python", sys.executable, 1)],
                              cwd=tmp_path, env=env, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    command(first)
    with PIL.Image.open(tmp_path / "up.png") as picture:
        assert picture.mode == "RGB" and picture.size[0] >= 16
    command('python -m monoformer_jax.sample --workdir=showcase --prompt="draw a seven" '
            "--out=seven.png")  # fmt: skip
    assert "seven" in command("python " + reads)
    assert json.loads((tmp_path / "up.json").read_text())["workdir"].endswith("shipped/showcase")
