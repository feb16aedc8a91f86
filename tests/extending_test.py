"""docs/extending.md: the toy model of the page goes through every command; a field is one line."""

import dataclasses
import json
import re
import sys
import types

import grain
import jax
import numpy as np
import pytest
from conftest import ROOT
from fixtures import losses, run

from monoformer_jax import batch as contract
from monoformer_jax import convert, plan, sample, train
from monoformer_jax.batch import PATCH, Field
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.packing import Pack
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.diffusion.objectives import OBJECTIVES, Objective
from monoformer_jax.errors import InputError
from monoformer_jax.models import MODELS, base_config, make_config
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.session import Session

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIG = """
from monoformer_jax.models import base_config

def get_config():
    c = base_config("toy")
    c.steps, c.batch_size, c.log_every, c.checkpoint_every = 4, 4, 1, 2
    c.data.max_seq_len, c.data.end_of_prompt = 64, False
    c.optimizer.learning_rate = 0.01
    return c
"""


@pytest.fixture(scope="module")
def toy():
    """The toy model, registered as its line in the table would do."""
    module = types.ModuleType("toy")
    sys.modules["toy"] = module  # dataclasses look their module up
    exec(compile(BLOCKS[0], "docs/extending.md", "exec"), module.__dict__)
    MODELS["toy"] = module
    yield module
    del MODELS["toy"], sys.modules["toy"]


@pytest.mark.slow
def test_a_new_model_goes_through_every_command(toy, tmp_path, capsys):
    """Trained, stopped and resumed with the losses of one run, sampled, planned, converted and back."""
    config, runs = tmp_path / "toy.py", [tmp_path / name for name in ("once", "twice")]
    config.write_text(CONFIG)
    arguments = [
        f"--config={config}",
        "--processes=1",
        "--config.optimizer.schedule=constant",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.learning_rate=0.1",
    ]
    assert run(train, *arguments, f"--workdir={runs[0]}") == 0
    assert run(train, *arguments, f"--workdir={runs[1]}", "--config.steps=2") == 0
    assert run(train, *arguments, f"--workdir={runs[1]}") == 0
    found = losses(runs[0])
    assert found == losses(runs[1]) and found.keys() == {1, 2, 3, 4}
    assert found[4][1] < found[1][1], "the text loss does not fall"

    out = tmp_path / "images.png"
    assert run(sample, f"--workdir={runs[0]}", "--prompt=draw", "--paint", f"--out={out}",
               "--processes=1") == 0  # fmt: skip
    assert out.is_file()
    assert (
        run(sample, f"--workdir={runs[0]}", "--prompt=two", "--max_tokens=3", "--processes=1") == 0
    )
    assert "'two' ->" in capsys.readouterr().out

    there, back = tmp_path / "exported", tmp_path / "back"
    run(convert, f"--from={runs[0]}", f"--to={there}", "--check")
    run(convert, f"--from={there}", f"--to={back}", "--check")
    assert (there / "model.safetensors").is_file()
    for a, b in zip(*(jax.tree.leaves(load_trained(path)[1]) for path in (runs[0], back))):
        np.testing.assert_array_equal(a, b)

    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    for mode in ("train", "sample"):
        file = tmp_path / f"{mode}.json"
        assert run(plan, f"--config={config}", "--topology=v5e:2x2", f"--mode={mode}",
                   f"--json={file}", "--config.batch_size=8") == 0  # fmt: skip
        assert json.loads(file.read_text())["parameters"] == 262 * 32 + 4 * 32 + 16


def test_a_new_model_in_a_session_equals_its_training_pass(toy):
    """Text after an image and guidance: the sampler knows nothing of the model's state."""
    c = base_config("toy")
    c.data.end_of_prompt = False
    config = make_config(c)
    params = toy.init(config.model, jax.random.key(0))
    params["text_head"] = 50 * params["text_head"]
    session = Session(Sampler(config, params, ByteTokenizer()), 2, seed=3)
    session.append([["a"], ["bc"]])
    session.begin_image([0, 1])
    images = session.generate_images([0, 1])
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()
    (first, _) = session.generate_text([4, 4])
    document = session.document(0)
    hidden = params["tokens"][document["tokens"]]
    expected = (hidden @ params["text_head"])[-1 - len(first.tokens) :].argmax(-1)
    assert first.tokens and first.tokens[1:] == expected[1:-1].tolist()


def test_a_new_objective_is_found_by_its_name(monkeypatch):
    scope = {}
    exec(BLOCKS[1], scope)
    assert isinstance(scope["clean"], Objective)
    monkeypatch.setitem(
        OBJECTIVES, "clean", dataclasses.replace(scope["clean"], solvers=("euler",))
    )
    c = base_config()
    c.objective.kind, c.sampling.solver = "clean", "euler"
    assert make_config(c).objective.kind == "clean"
    c.objective.kind = "dirty"
    with pytest.raises(InputError, match=r"objective\.kind='dirty' is none of .*clean"):
        make_config(c)


def test_a_new_source_is_a_function():
    scope = {"make_square": lambda n: np.full((2, 2, 1), n, np.float32)}
    exec(BLOCKS[2], scope)
    source = scope["squares"](None)
    prompt, image = source.to_parts(source.examples[3], None)
    assert prompt.texts == ("a square of 3",) and image.denoise and image.pixels[0, 0, 0] == 3


def test_a_new_field_is_one_line(monkeypatch):
    """`prompt_stop` of the page: packed behind other documents it counts tokens of the row."""
    (line,) = re.findall(r'^\+    ("prompt_stop".*),$', PAGE, re.MULTILINE)
    monkeypatch.setitem(
        contract.FIELDS,
        "prompt_stop",
        eval(f"{{{line}}}", {"Field": Field, "np": np})["prompt_stop"],
    )
    config = make_config(base_config())
    tokenizer, layout = ByteTokenizer(), config.layout
    assert contract.spec(layout, 2, 9)["prompt_stop"].shape == (2, 9)

    def document(number):
        image = Image(np.ones((4, 4, 1), np.float32), denoise=False)
        made = build_document(["a" * number, image], tokenizer, layout)
        made["prompt_stop"] = np.full(len(made["tokens"]), 1 + number, np.int32)
        return made

    documents = grain.MapDataset.source([document(n) for n in (2, 3, 4)]).to_iter_dataset()
    (rows,) = Pack(documents, layout, rows=1, length=48, buffer=3, pad_id=0, max_images=4)
    row = {name: values[0] for name, values in rows.items()}
    assert row["segment_ids"].max() == 3
    for number, text in ((1, 2), (2, 3), (3, 4)):
        here = np.flatnonzero(row["segment_ids"] == number)
        assert (row["prompt_stop"][here] == here[0] + 1 + text).all()
        assert set(row["image_ids"][here]) == {0, number}
        assert row["positions"][here].tolist() == list(range(len(here)))
    assert (row["token_types"] == PATCH).sum() == 12 and not row["prompt_stop"][
        row["segment_ids"] == 0
    ].any()
    contract.check(rows, contract.spec(layout, 1, 48), 4, layout.vocab_size)
