"""Data files of other people: what their keys say is read, and what they do not say is not made up."""

import argparse
import json

import pytest

from monoformer_jax import encode_latents
from monoformer_jax.config import DataConfig
from monoformer_jax.data.documents import Prompt, UntrainedText
from monoformer_jax.data.raw import open_raw
from monoformer_jax.data.records import Records
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.templates import chat_parts
from monoformer_jax.errors import InputError

TALK = chat_parts([{"role": "user", "content": "one?"}, {"role": "assistant", "content": "ONE"}])[
    :-1
]


def write(folder, *rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def parts_of(folder, row):
    (example,) = open_raw(str(write(folder, row)), None)
    return example().parts


def encode(source, to, *more):
    """Runs encode_latents in this process."""
    parser = argparse.ArgumentParser()
    encode_latents.add_arguments(parser)
    encode_latents.main(
        parser.parse_args([f"--from={source}", f"--to={to}", "--processes=1", *more])
    )


@pytest.mark.parametrize("speaker", ["role", "from", "speaker"])
@pytest.mark.parametrize(
    "user, model", [("user", "assistant"), ("human", "gpt"), ("Human", "model")]
)
def test_the_speaker_of_a_turn_decides(tmp_path, speaker, user, model):
    def turns(*pairs):
        return {"conversations": [{speaker: who, "value": text, "id": 1} for who, text in pairs]}

    assert parts_of(tmp_path, turns((user, "one?"), (model, "ONE"))) == TALK
    kind = turns(("system", "be kind"), (user, "one?"), (model, "ONE"))
    assert parts_of(tmp_path, kind) == [UntrainedText("be kind"), *TALK]
    for wrong in (
        turns((model, "WELCOME"), (user, "one?"), (model, "ONE")),
        turns((user, "one?"), (user, "two?"), (model, "ONE")),
        turns((user, "one?")),
        turns(("system", "be kind")),
        {"conversations": []},
    ):
        with pytest.raises(InputError, match="user and assistant must alternate"):
            parts_of(tmp_path, wrong)


@pytest.mark.parametrize(
    "turn, message",
    [
        ({"value": "one?"}, "a turn is said by '': its role, from or speaker must be one of user"),
        ({"from": "narrator", "value": "one?"}, "a turn is said by 'narrator'"),
        ({"from": None, "value": "one?"}, "a turn is said by ''"),
        ({"from": "gpt", "role": "user", "value": "one?"}, "has both role and from"),
        ({"from": "human", "value": "a", "content": "b"}, "has both content and value"),
        ({"from": "human", "value": ["a"]}, "a turn has no text"),
        ({"from": "human", "value": None}, "a turn has no text"),
        ({"from": "human", "value": " "}, "a turn is empty"),
        (3, "3 is not a turn with a speaker and a text"),
        ({"from": "human", "value": "<image>\nwhat?"}, "has 0 images, but shows 1"),
    ],
)
def test_a_conversation_that_cannot_be_told_apart_is_refused(tmp_path, turn, message):
    row = {"conversations": [turn, {"from": "gpt", "value": "ONE"}]}
    with pytest.raises(InputError, match=f"rows.jsonl:1.* {message}"):
        parts_of(tmp_path, row)


def test_marks_of_images_are_those_of_llava(tmp_path):
    talk = [{"from": "human", "value": "<image>\none?"}, {"from": "gpt", "value": "ONE"}]
    image, *rest = parts_of(tmp_path, {"image": "a.png", "conversations": talk})
    assert rest == TALK and not image.denoise
    talk[0]["value"] = "<image>"  # an image without a word is a question too
    assert len(parts_of(tmp_path, {"image": "a.png", "conversations": talk})) == 5
    talk[0]["value"] = "<image> and <image>"
    with pytest.raises(InputError, match="has 1 images, but shows 2"):
        parts_of(tmp_path, {"image": "a.png", "conversations": talk})
    # Elsewhere, <image> is text.
    assert "what is <image>?" in parts_of(tmp_path, {"data": ["what is <image>?", "HTML"]})[1].text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None}, {"prompt": float("nan")}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": 5},
        {"captions": []}, {"captions": None}, {"captions": [""]}, {"captions": ["a cat", None]},
        {"captions": "a cat"}, {"captions": ["a cat"], "prompt": "a dog"},
        {"captions": ["a cat"], "img_path": "b.png"}, {"prompt": "a cat", "image": 3},
        {"prompt": "a cat", "image": "a\0.png"}, {"prompt": "a cat", "image": "\ud83d.png"},
        {"prompt": "a cat", "image": None}, {"parts": [{"prompt": ""}]}, {"parts": [{"image": None}]},
    ],
)  # fmt: skip
def test_a_caption_or_image_that_is_missing_or_said_twice_is_refused(tmp_path, row):
    with pytest.raises(InputError, match=r"rows\.jsonl:1"):
        parts_of(tmp_path, {"image": "a.png"} | row)


def test_null_is_an_absent_key(tmp_path):
    """As tables are exported: every row has all columns."""
    row = {"image": None, "img_path": "a.png", "prompt": "a cat", "captions": None,
           "messages": float("nan")}  # fmt: skip
    prompt, image = parts_of(tmp_path, row)
    assert prompt == Prompt(("Please generate an image of a cat",)) and image.denoise
    row = {"image": float("nan"), "messages": ["one?", "ONE"], "captions": None}
    assert parts_of(tmp_path, row) == TALK


def test_what_is_left_out_is_named_and_counted(tmp_path, capsys):
    file = write(
        tmp_path,
        {"id": "0", "data": ["one?", "ONE"]},
        {"id": "1", "data": ["nice \ud83d", "thanks"]},
        {
            "id": "2",
            "conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "?"}],
        },
        {"image": "a.png", "prompt": None},
    )
    with file.open("ab") as lines:
        lines.write(b'{"data": ["caf\xe9", "yes"]}\n{"data": ["\xe2\x80\xa8two?", "TWO"]}\r\n')
    encode(file, tmp_path / "records")
    said = capsys.readouterr()
    assert "2 examples in 1 files; 4 could not be read and were skipped" in said.out
    for line, reason in ((2, "is not Unicode text"), (3, "must alternate"), (4, "has no parts"),
                         (5, "is not Unicode text")):  # fmt: skip
        assert any(f"rows.jsonl:{line}" in x and reason in x for x in said.err.splitlines())
    records = Records(str(tmp_path / "records"))
    assert TALK in [records[0], records[1]]
    # A line separator is part of a text, not the end of a line.
    assert UntrainedText("\u2028two?") in [*records[0], *records[1]]


ONE, TWO = '{"data": ["one?", "ONE"]}', '{"data": ["two?", "TWO"]}'


@pytest.mark.parametrize(
    "name, text, count",
    [
        ("train_0.json", f"{ONE}\n{TWO}\n", 2),  # as many published files are
        ("train_0.json", f"{ONE}\n", 1),
        ("train_0.json", f"[{ONE},\n {TWO}]", 2),
        ("train_0.json", '{"data":\n ["one?", "ONE"]}', 1),
        ("train_0.json", f"\ufeff{ONE}\n\n{TWO}", 2),  # as programs on Windows write
        ("train_0.jsonl", f"\ufeff{ONE}\r\n\r\n{TWO}\r\n", 2),
    ],
)
def test_the_forms_of_a_file(tmp_path, name, text, count):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    examples = open_raw(str(tmp_path / name), None)
    assert len(examples) == count and examples[0]().parts == TALK


def test_a_damaged_json_list_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"data": ["one?", "ONE"]},', encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.json is not JSON"):
        open_raw(str(tmp_path / "rows.json"), None)


def test_records_of_another_shape_name_both_sides(tmp_path):
    write(tmp_path, {"data": ["one?", "ONE"]})
    encode(tmp_path / "rows.jsonl", tmp_path / "records")
    info = tmp_path / "records" / "info.json"
    c = DataConfig(
        mixture={"mine": 1.0}, records={"mine": str(tmp_path / "records")}, image_size=32
    )
    assert open_sources(c, 1).keys() == {"mine"}  # records of text alone have no shape
    for shape, message in (
        (
            [16, 16, 4],
            r"mine holds latents of 16×16×4, but data.image_size=32 and model.channels=1",
        ),
        ([32, 32, 4], r"mine holds latents of 32×32×4, .* model.channels=1 make 32×32×1"),
        ([32, 16, 1], r"mine holds latents of 32×16×1, "),
    ):
        info.write_text(json.dumps({"examples": 1, "files": 1, "shape": shape}), encoding="utf-8")
        with pytest.raises(InputError, match=rf"data\.records\.{message}"):
            open_sources(c, 1)
