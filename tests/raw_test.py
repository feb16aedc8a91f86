"""Data files of other people: what their keys say is read, and what they do not say is not made up."""

import argparse
import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from monoformer_jax import prepare_data
from monoformer_jax.config import DataConfig
from monoformer_jax.data.documents import EndOfTurn, Image, Prompt, UntrainedText
from monoformer_jax.data.image_io import from_uint8
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
    """Runs prepare_data in this process."""
    parser = argparse.ArgumentParser()
    prepare_data.add_arguments(parser)
    prepare_data.main(parser.parse_args([f"--from={source}", f"--to={to}", "--processes=1", *more]))


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
        {"captions": 7}, {"captions": ["a cat"], "prompt": "a dog"},
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
    for line, reason in ((2, "is not Unicode text"), (3, "must alternate"), (4, "has no captions"),
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
            r"mine holds images of 16×16×4, but data.image_size=32 and model.channels=1",
        ),
        ([32, 32, 4], r"mine holds images of 32×32×4, .* model.channels=1 make 32×32×1"),
        ([32, 16, 1], r"mine holds images of 32×16×1, "),
    ):
        info.write_text(json.dumps({"examples": 1, "files": 1, "shape": shape}), encoding="utf-8")
        with pytest.raises(InputError, match=rf"data\.records\.{message}"):
            open_sources(c, 1)


def prepare(source, folder, capsys, *more):
    """The records of a dataset as pixels of 4×4, and what was said of it."""
    encode(source, folder, "--image_size=4", "--workers=0", *more)
    records, said = Records(str(folder)), capsys.readouterr()
    return [records[i] for i in range(len(records))], said.out + said.err


RED, BLUE = (np.full((4, 4, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))


@pytest.fixture
def pictures(tmp_path):
    """red.png and blue.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, pixels in (("red", RED), ("blue", BLUE)):
        PIL.Image.fromarray(pixels).resize((12, 8), 0).save(folder / f"{name}.png")
    return folder


def described(example):
    """An example in short: texts as they are, pictures by colour, "!" for one to generate."""
    for part in example:
        if isinstance(part, Image):
            same = [(part.pixels == from_uint8(pixels)).all() for pixels in (RED, BLUE)]
            yield ("red", "blue")[same.index(True)] + "!" * part.denoise
        else:
            yield part.texts if isinstance(part, Prompt) else part


def described_all(examples):
    return sorted(map(str, (list(described(example)) for example in examples)))


CAPTIONED = [[("a red square", "red"), "red!"], [("a blue square",), "blue!"]]


@pytest.mark.parametrize("head, end", [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n")])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "tsv", "metadata", "parquet"])
def test_captions_of_pictures_in_every_form(pictures, tmp_path, capsys, form, head, end):
    """With and without a byte order mark, with the line ends of Unix and of Windows."""
    captions = {"red": ["a red square", "red"], "blue": ["a blue square"]}

    def write_text(path, *lines):
        path.write_bytes(head + "".join(line + end for line in lines).encode())

    source, want = pictures, CAPTIONED
    if form == "txt":
        for name, lines in captions.items():
            write_text(pictures / f"{name}.txt", *lines)
    elif form == "jsonl":
        source = pictures / "rows.jsonl"
        rows = [{"image": f"{name}.png", "captions": texts} for name, texts in captions.items()]
        write_text(source, *map(json.dumps, rows))
    elif form == "parquet":  # columns with the pictures inside, as on the Hugging Face hub
        rows = [{"image": {"bytes": (pictures / f"{name}.png").read_bytes(), "path": None},
                 "captions": texts} for name, texts in captions.items()]  # fmt: skip
        source = tmp_path / "rows.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), source)
    else:
        name = {"csv": "rows.csv", "tsv": "rows.tsv", "metadata": "metadata.csv"}[form]
        tab = "\t" if form == "tsv" else ","
        rows = [f'red.png{tab}"a red ""square""{tab} or{end}not"', f"blue.png{tab}a blue square"]
        write_text(pictures / name, f"file_name{tab}text", *rows)
        source = pictures if form == "metadata" else pictures / name
        want = [[(f'a red "square"{tab} or{end}not',), "red!"], CAPTIONED[1]]
    records, said = prepare(source, tmp_path / "records", capsys)
    assert described_all(records) == sorted(map(str, want)) and "skipped" not in said


def test_folders_are_classes_unless_there_are_captions(pictures, tmp_path, capsys):
    with pytest.raises(InputError, match=r"pictures without captions: put a \.txt beside each"):
        open_raw(str(pictures))
    for name in ("red", "blue"):
        (pictures / f"a {name} thing" / "more").mkdir(parents=True)
        (pictures / f"{name}.png").rename(pictures / f"a {name} thing" / "more" / "1.png")
    records, _ = prepare(pictures, tmp_path / "records", capsys)
    assert described_all(records) == ["[('a blue thing',), 'blue!']", "[('a red thing',), 'red!']"]
    (pictures / "a red thing" / "more" / "1.txt").write_text("red")
    (pictures / "a red thing" / "2.TXT").write_text("lost")
    (pictures / "a red thing" / "._1.png").write_text("of macOS")
    records, said = prepare(pictures, tmp_path / "more", capsys)
    assert described_all(records) == ["[('red',), 'red!']"]
    assert "2 could not be read and were skipped: missing_file 2" in said
    assert "1.png has no caption: there is no 1.txt" in said
    assert "2.TXT has no picture of that name" in said
    with pytest.raises(InputError, match="holds no pictures"):
        open_raw(str(tmp_path / "records"))


ASK, SAY = UntrainedText("### Human: "), UntrainedText("### Assistant: ")
ROWS = [
    ({"image": "red.png", "caption": "red"}, [("red",), "red!"]),
    ({"image": "red.png", "captions": ["r"], "messages": ["colour?", "red"]}, None),  # two examples
    ({"text": "a sentence"}, ["a sentence"]),
    ({"source": "red.png", "instruction": "blue, please", "target": "blue.png"},
     ["red", ("blue, please",), "blue!"]),
    ({"input_image": "red.png", "edit_prompt": ["make it blue", "blue"], "edited_image": "blue.png"},
     ["red", ("make it blue", "blue"), "blue!"]),
    ({"images": ["red.png", "blue.png", "red.png"],
      "messages": ["<image> make it blue", "<image>", "and <image> is", "red"]},
     [ASK, "red", UntrainedText("make it blue"), SAY, "blue!", EndOfTurn(),
      UntrainedText("### Human: and"), "red", UntrainedText("is### Assistant: "), "red"]),
    ({"texts": ["one", None, "two", None, None],
      "images": [None, "red.png", None, "blue.png", "red.png"]},
     ["one", "red", "two", "blue", "red"]),
    ({"texts": ["one", None], "images": [None, "red.png"], "generate": True}, ["one", "red!"]),
]  # fmt: skip


def joined(parts):
    """Adjacent texts without loss as one, which is how they are read."""
    made = []
    for part in parts:
        if made and isinstance(part, UntrainedText) and isinstance(made[-1], UntrainedText):
            part = UntrainedText(made.pop().text + part.text)
        made.append(part)
    return made


def test_edits_pages_and_conversations_with_any_number_of_pictures(pictures, tmp_path, capsys):
    file = write(pictures, *(row for row, _ in ROWS))
    found, said = prepare(file, tmp_path / "records", capsys)
    talk = [UntrainedText("### Human: colour?### Assistant: "), "red"]
    want = [joined(parts) for _, parts in ROWS if parts] + [[("r",), "red!"], ["red", *talk]]
    assert sorted(str(joined(described(e))) for e in found) == sorted(map(str, want))
    assert "skipped" not in said


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "red.png", "captoins": ["red"]}, "'captoins' is not understood: did you mean c"),
        ({"image": "a", "caption": "b", "aesthetic": 5}, "Give --ignore=aesthetic to read"),
        ({"messages": [{"role": "user", "content": "a", "mask": 1}]}, "a turn: the key 'mask' is not"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_understood_names_its_line(tmp_path, row, message):
    file = write(tmp_path, {"text": "fine"}, row)
    with pytest.raises(InputError, match=f"rows.jsonl:2.*{message}"):
        encode(file, tmp_path / "records")
    assert not (tmp_path / "records").exists()
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=f"rows.parquet.*{message}"):
        open_raw(str(tmp_path / "rows.parquet"))
    columns = ",".join(row)
    (tmp_path / "rows.csv").write_text(f"{columns}\n")
    if "messages" not in row:
        with pytest.raises(InputError, match=f"rows.csv:1.*{message}"):
            open_raw(str(tmp_path / "rows.csv"))
    names = ("captoins", "aesthetic", "mask")
    assert len(open_raw(str(file), None, names)) == 2


@pytest.mark.parametrize(
    "row, message",
    [
        ({"source": "red.png", "target": "blue.png"}, "has source and target, but no instruction"),
        ({"texts": ["a"]}, "has texts, but no images"),
        ({"texts": ["a"], "images": ["a.png"]}, "place 1 of the page must hold either"),
        ({"texts": ["a"], "images": []}, "must be lists of one length"),
        ({"images": ["a.png"], "messages": ["what?", "red"]}, "has 1 images, but 0 times <image>"),
        ({"images": ["a.png"], "captions": ["red"]}, "has both captions and images"),
        ({"parts": [{"text": "a"}], "captions": ["b"]}, "has both parts and captions"),
        ({"id": 3}, "has no captions, no conversation, no parts and no texts"),
    ],
)
def test_a_row_that_says_half_or_too_much_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1.*{message}"):
        parts_of(tmp_path, row)


def test_tables_that_cannot_be_read(tmp_path):
    for name, text, message in (
        ("a.csv", "", "has no line with the names"),
        ("b.csv", "text,text\n", "names two columns text"),
        ("c.csv", 'text\n"a', r"c.csv:2 is not CSV \(unexpected end of data\)"),
        ("d.parquet", "PAR1", "is not a Parquet file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            open_raw(str(tmp_path / name))
    (tmp_path / "e.csv").write_text("file_name,text\n1.png,one,more\n2.png\n\n3.png,\n")
    for example, message in zip(
        open_raw(str(tmp_path / "e.csv")),
        ("e.csv:2 has 3 cells", "e.csv:3 has 1 cells", "e.csv:5 has no captions"),
        strict=True,
    ):
        with pytest.raises(InputError, match=message):
            example()


def test_pixels_are_stored_as_they_are(tmp_path, capsys):
    """Every value of a byte comes back, in colour and in grey."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    PIL.Image.fromarray(ramp).save(tmp_path / "ramp.png")
    (tmp_path / "ramp.txt").write_text("a ramp")
    for channels in (1, 3):
        folder = tmp_path / f"records{channels}"
        encode(tmp_path, folder, "--image_size=16", f"--channels={channels}", "--workers=0")
        (prompt, image), info = Records(str(folder))[0], Records(str(folder)).info
        assert info["shape"] == [16, 16, channels] and prompt == Prompt(("a ramp",))
        want = from_uint8(np.repeat(ramp[..., None], channels, -1))
        np.testing.assert_array_equal(image.pixels, want)
