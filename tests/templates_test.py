"""Prompt templates: the strings of the released weights, and unique ImageNet class names."""

import json

import pytest

from monoformer_jax.data.documents import EndOfTurn, UntrainedText
from monoformer_jax.data.templates import (
    chat_parts,
    class_prompts,
    disambiguate,
    read_labels,
)
from monoformer_jax.errors import InputError


def labels():
    names = [f"class {i}" for i in range(1000)]
    names[134] = names[517] = "crane"
    names[638] = names[639] = "maillot"
    return names


def test_templates_are_those_of_training():
    assert class_prompts("tench") == [
        "Please generate an image of tench.", "tench", "an image of tench.", "an photo of tench.",
    ]  # fmt: skip
    talk = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": ["what", "?"]}]  # fmt: skip
    system, *rest = chat_parts(talk)
    assert system == UntrainedText("Be brief. ")
    assert "".join(p.text for p in rest[:3]) == "### Human: hello### Assistant: "
    assert rest[3:5] == ["hi", EndOfTurn()]  # what is learned
    assert "".join(p.text for p in rest[5:]) == "### Human: what?### Assistant: "


@pytest.mark.parametrize("form", [list, lambda names: {str(i): n for i, n in enumerate(names)}])
def test_ambiguous_labels_become_unique(tmp_path, form):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(form(labels())))
    read = read_labels(path)
    assert len(set(read)) == 1000
    assert read[134] == "crane (bird)" and read[517] == "crane (machine)"
    assert "maillot" in read[638] and "maillot" in read[639]
    assert [a for a, b in zip(read, labels()) if a != b] == [read[i] for i in (134, 517, 638, 639)]


def test_distinct_names_are_unchanged():
    names = [f"class {i}" for i in range(1000)]
    assert disambiguate(names) == names


def test_bad_labels(tmp_path):
    path = tmp_path / "labels.json"
    with pytest.raises(InputError, match=r"labels\.json does not exist"):
        read_labels(path)
    for text in ("[1, 2]", "{", '["a"]'):
        path.write_text(text)
        with pytest.raises(InputError, match="not a JSON list of 1000 ImageNet names"):
            read_labels(path)
    names = labels()
    names[3] = names[4]
    with pytest.raises(InputError, match="two classes share the name class 4"):
        disambiguate(names)
