"""Broken pictures, records and texts are skipped, counted and named; a resumed stream is the same."""

import contextlib
import json

import msgpack
import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from raw_test import encode

from monoformer_jax.data.documents import Image, Prompt
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.records import Records, pack, write_info, write_records
from monoformer_jax.data.templates import chat_parts
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import BadExample, InputError
from monoformer_jax.training.loop import train

GOOD = 40
RNG = np.random.default_rng(0)


def picture(size=8, channels=1):
    return RNG.integers(0, 256, (size, size, channels), np.uint8)


def latent(value=0.0):
    return np.full((8, 8, 1), value, np.float32)


def captioned(number, image=None):
    return [Prompt((f"picture {number}",)), Image(picture() if image is None else image, True)]


BAD = [  # (reason, the bytes of a record)
    ("unreadable", pack(captioned(0))[:50]),  # cut off
    ("unreadable", msgpack.packb([{"shape": (8, 8, 1), "pixels": b"short", "denoise": True}])),
    ("schema", msgpack.packb([{"painting": "of another version"}])),
    ("schema", msgpack.packb({"prompt": ["no list of parts"]})),
    ("schema", msgpack.packb(7)),
    ("text", msgpack.packb([{"text": "caf\udce9"}], unicode_errors="surrogateescape")),
    ("text", msgpack.packb([{"text": "\ud83d"}], unicode_errors="surrogatepass")),
    ("empty", pack([])),
    ("empty", pack([Prompt((" ",)), ""])),
    ("size", pack(captioned(0, picture(size=4)))),
    ("size", pack(captioned(0, picture(channels=3)))),
    ("not_finite", pack([Image(latent(np.nan), True, latent())])),
    ("not_finite", pack([Image(latent(), True, latent(np.inf))])),
    ("not_finite", pack([Image(latent(1e6), True)])),  # infinite in float16
]


def write_raw(folder, records):
    folder.mkdir()
    file = folder / "records-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    write_info(epath.Path(folder), [epath.Path(file)])
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Records of which every fourth is bad; the second is, for one."""
    records = [pack(captioned(n)) for n in range(GOOD)]
    for place, (_, record) in enumerate(BAD):
        records.insert(4 * place + 1, record)
    return write_raw(tmp_path_factory.mktemp("damaged") / "records", records)


def test_bad_records_are_skipped_counted_and_named(damaged, change):
    data = {"mixture": {"mine": 1.0}, "records": {"mine": str(damaged)}, "max_bad_fraction": 0.5}
    config, said = change(data=data | {"packing_buffer": 4, "max_seq_len": 64}), []
    batches = Batches(config, ByteTokenizer(), log=said.append)
    for _ in range(20):
        next(batches.iterator)
    want = {}
    for reason, _ in BAD:
        want[reason] = want.get(reason, 0) + 1
    skipped = batches.skipped
    assert skipped.keys() == want.keys()
    epochs = skipped["schema"] / want["schema"]
    assert epochs > 2
    for reason, number in want.items():  # up to an epoch that has just begun
        assert abs(skipped[reason] - epochs * number) < number + 1
    assert len(said) == len(BAD)  # once, in however many epochs
    for place, (reason, _) in enumerate(BAD):
        start = f"skipped example {4 * place + 1} of mine ({reason}): "
        assert sum(line.startswith(start) and len(line) > len(start) for line in said) == 1
    # The counts are in what a checkpoint saves, and continue from there.
    state = json.loads(json.dumps(batches.iterator.get_state()))
    assert '"not_finite": ' in json.dumps(state)
    resumed = Batches(config, ByteTokenizer())
    resumed.iterator.set_state(state)
    for name, values in next(batches.iterator).items():
        if name == "tokens":
            following = next(resumed.iterator)
        np.testing.assert_array_equal(values, following[name])
    assert resumed.skipped == batches.skipped


def test_a_run_reports_and_saves_what_it_skipped(damaged, change, tmp_path, capsys):
    data = {"mixture": {"mine": 1.0}, "records": {"mine": str(damaged)}, "max_bad_fraction": 0.5}
    train(change(steps=2, log_every=1, data=data), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = {name: n for name, n in json.loads(lines[-1]).items() if name.startswith("skipped_")}
    assert found.keys() - {"skipped_examples"} == {f"skipped_{reason}" for reason, _ in BAD}
    assert 2 * found["skipped_examples"] == sum(found.values()) >= 2 * len(BAD)
    saved = tmp_path / "run" / "checkpoints" / "2" / "data" / "metadata"
    (state,) = json.loads(saved.read_text())["streams"].values()
    counts = {f"skipped_{name}": number for name, number in state["skipped"].items()}
    assert counts.pop("skipped_kept") > 0
    assert counts == {name: n for name, n in found.items() if name != "skipped_examples"}
    said = capsys.readouterr()
    assert f"examples skipped: {found['skipped_examples']}" in said.out
    assert said.err.count("skipped example 1 of mine (unreadable): the record is damaged") == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stops_when_too_many_examples_are_bad(damaged, change, workers):
    data = {"mixture": {"mine": 1.0}, "records": {"mine": str(damaged)}, "streams": 2}
    batches = Batches(
        change(data=data | {"max_bad_fraction": 0.02}), ByteTokenizer(), workers=workers
    )
    message = (
        r"more than data.max_bad_fraction=0.02 of 1000 examples cannot be used; the last is example"
    )
    with contextlib.closing(batches.iterator), pytest.raises(InputError, match=message):
        for _ in range(100):
            next(batches.iterator)


def test_files_are_checked_when_they_are_opened(damaged, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    for file in damaged.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (file,) = folder.glob("*.array_record")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=rf"has {len(whole) - 1000} bytes, but {len(whole)} were"):
        Records(str(folder))
    # A part of the file overwritten on the disk: the examples there are lost, the others are read.
    place = whole.index(b"picture 20") if b"picture 20" in whole else len(whole) // 3
    file.write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
    records, found = Records(str(folder)), []
    for number in range(len(records)):
        with contextlib.suppress(BadExample):
            found.append(records[number])
    whole = sum(reason in ("empty", "size", "not_finite") for reason, _ in BAD) + GOOD
    assert whole / 2 < len(found) < whole


def test_broken_files_of_a_dataset_are_counted_by_reason(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()

    def save(name, caption=b"fine", image=None):
        (folder / f"{name}.txt").write_bytes(caption)
        PIL.Image.fromarray(picture(40, 3)).save(folder / f"{name}.jpg", quality=95)
        if image is not None:
            whole = (folder / f"{name}.jpg").read_bytes()
            (folder / f"{name}.jpg").write_bytes(image(whole))

    save("good", "gut, schön".encode())
    save("cut", image=lambda data: data[: len(data) // 2])
    save("nothing", image=lambda data: b"")
    save("html", image=lambda data: b"<html>404</html>")
    save("latin", "schön".encode("latin-1"))
    save("windows", b"\xff\xfe" + "fine".encode("utf-16-le"))
    save("silent", b" \r\n")
    (folder / "lost.txt").write_text("no picture")
    encode(folder, tmp_path / "records", "--image_size=8", "--workers=0")
    said = capsys.readouterr()
    assert "1 examples in 1 files; 7 could not be read and were skipped: empty 1, missing_file 1, " \
           "picture 3, text 2" in said.out  # fmt: skip
    for name in ("cut.jpg", "nothing.jpg", "html.jpg", "latin.txt", "windows.txt", "silent.txt",
                 "lost.txt"):  # fmt: skip
        assert (
            sum(line.startswith("skipped: ") and name in line for line in said.err.splitlines())
            == 1
        )
    assert Records(str(tmp_path / "records"))[0][0] == Prompt(("gut, schön",))


def test_every_source_resumes_as_it_was_without_and_with_workers(damaged, tmp_path, change):
    """Digits, and records of pixels, latents, conversations, edits and pages, some of them damaged."""
    kinds = {
        "latents": [[Prompt(("a",)), Image(latent(i / 9), True, latent(-i))] for i in range(9)],
        "talks": [
            [Image(picture(), False), *chat_parts([
                {"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": "it"}])]
            for i in range(9)
        ],
        "edits": [
            [Image(picture(), False), Prompt((f"{i}", "b")), Image(picture(), True)] for i in range(9)
        ],
        "pages": [[f"{i}", *(Image(picture(), False) for _ in range(i)), "end"] for i in range(3)],
    }  # fmt: skip
    records = {"pixels": str(damaged)}
    for name, examples in kinds.items():
        write_records(tmp_path / name, examples)
        records[name] = str(tmp_path / name)
    mixture = dict.fromkeys(["draw", "read", "say", *records], 1.0)
    data = {"mixture": mixture, "records": records, "streams": 3, "packing_buffer": 4,
            "max_seq_len": 96, "sample_latents": True}  # fmt: skip
    config, want, got, state = change(batch_size=6, data=data), [], [], None
    batches = Batches(config, ByteTokenizer())
    for _ in range(9):
        want.append((next(batches.iterator), dict(batches.skipped)))
    for workers in (0, 2, 0):
        batches = Batches(config, ByteTokenizer(), workers=workers)
        with contextlib.closing(batches.iterator):
            if state is not None:
                batches.iterator.set_state(state)
            for _ in range(3):
                got.append((next(batches.iterator), dict(batches.skipped)))
            state = json.loads(json.dumps(batches.iterator.get_state()))
    assert len(want[-1][1]) > 3
    for (batch, skipped), (other, counted) in zip(want, got, strict=True):
        assert skipped == counted
        for name, values in batch.items():
            np.testing.assert_array_equal(values, other[name])
