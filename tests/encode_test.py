"""prepare_data: pictures as in sampling, files divided over processes, bad pictures, resume."""

import argparse
import json
import os
import signal
from functools import partial

import numpy as np
import PIL.Image
import pytest
from conftest import REFERENCE

from monoformer_jax import prepare_data
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.config import TokenLayout
from monoformer_jax.data import decoding
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.raw import RawExample, RawImage, open_raw
from monoformer_jax.data.records import Records
from monoformer_jax.errors import PREEMPTED, InputError

VAE = REFERENCE / "vae_tiny16"
GOOD = 10


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Ten pictures, the first turned by EXIF and partly transparent, and four that cannot be read."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(GOOD):
        picture = PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        exif = picture.getexif()
        if number == 0:
            picture.putalpha(PIL.Image.fromarray(rng.integers(0, 256, (30, 40), np.uint8)))
            exif[0x0112] = 6
        picture.save(folder / f"{number}.png", exif=exif)
        lines.append({"image": f"{number}.png", "captions": [f"picture {number}"]})
    PIL.Image.new("L", (1, 40)).save(folder / "strip.png")
    (folder / "text.png").write_text("not a picture")
    (folder / "half.png").write_bytes((folder / "1.png").read_bytes()[:900])
    for name in ("strip.png", "text.png", "half.png", "gone.png"):
        lines.append({"image": name, "captions": ["lost"]})
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def run(raw, to, *more):
    parser = argparse.ArgumentParser()
    prepare_data.add_arguments(parser)
    arguments = [f"--from={raw / 'all.jsonl'}", f"--to={to}", "--codec=sd_vae", f"--vae={VAE}",
                 "--image_size=32", "--per_file=3", "--batch_size=2", "--workers=0"]  # fmt: skip
    return prepare_data.main(parser.parse_args([*arguments, *more]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """The records of one process, on four devices."""
    folder = tmp_path_factory.mktemp("whole") / "records"
    assert run(raw, folder, "--processes=1") == 0
    return folder


def test_a_picture_is_the_same_to_training_and_to_sampling(raw, whole):
    records = Records(str(whole))
    found = {prompt.texts[0]: image for prompt, image in (records[i] for i in range(len(records)))}
    assert found.keys() == {f"picture {number}" for number in range(GOOD)}
    processor = ImageProcessor(TokenLayout(262, 4, 2), 16, vae=VAE)
    for number in (0, 1):
        want = processor.encode(raw / f"{number}.png").pixels
        got = found[f"picture {number}"].pixels
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)  # float16


def test_each_unreadable_picture_is_named_and_costs_one_example(raw, tmp_path, capsys):
    assert run(raw, tmp_path / "r", "--processes=1") == 0
    out, err = capsys.readouterr()
    assert f"{GOOD} examples in 5 files; 4 could not be read and were skipped" in out
    assert "images/s" in out and " left" in out
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    for name, reason in (("strip.png", "is 1×40 pixels"), ("text.png", "cannot be read"),
                         ("half.png", "cannot be read"), ("gone.png", "there is no file")):  # fmt: skip
        assert sum(name in line and reason in line for line in skipped) == 1, name
    assert len(skipped) == 4


def test_an_unforeseen_error_costs_one_example_and_is_named():
    def fails():
        raise TypeError("a number is no path")

    bad, good = decoding.decode_examples(
        [fails, lambda: RawExample("a.jsonl:1", ["hello"])], 32, workers=0
    )
    assert bad.error == "TypeError: a number is no path" and good.parts == ["hello"]
    assert good.error is None and good.pixels.shape == (0, 32, 32, 3)


def test_processes_divide_the_files(raw, whole, tmp_path, capsys):
    """The second process ends first; the one that finds all files written completes the folder."""
    folder = tmp_path / "records"
    assert run(raw, folder, "--processes=2", "--process=1") == 0
    assert sorted(contents(folder)) == [f"records-0000{n}-of-00005.array_record" for n in (1, 3)]
    assert "process 1 of 2 is done; info.json follows" in capsys.readouterr().out
    assert run(raw, folder, "--processes=2", "--process=0") == 0
    assert contents(folder) == contents(whole)
    with pytest.raises(InputError, match="is already complete; nothing was changed"):
        run(raw, folder, "--processes=1")
    with pytest.raises(InputError, match="--process=2 is not between 0 and --processes=2 - 1"):
        run(raw, folder, "--processes=2", "--process=2")


def test_sigterm_keeps_complete_files_and_leaves_nothing_else(raw, whole, tmp_path, monkeypatch):
    folder, decoded = tmp_path / "records", []

    def stopping(*arguments):
        for example in decode(*arguments):
            decoded.append(example)
            if len(decoded) == 8:  # in the third file
                os.kill(os.getpid(), signal.SIGTERM)
            yield example

    decode = decoding.decode_examples
    monkeypatch.setattr(decoding, "decode_examples", stopping)
    assert run(raw, folder, "--processes=1") == PREEMPTED
    assert sorted(contents(folder)) == [f"records-0000{n}-of-00005.array_record" for n in (0, 1)]
    monkeypatch.setattr(decoding, "decode_examples", decode)
    assert run(raw, folder, "--processes=1") == 0 and contents(folder) == contents(whole)


def pair(*files):
    return RawExample("pair", [RawImage(partial(open_image, f), denoise=True) for f in files])


def test_worker_processes_decode_the_same_in_order(raw):
    """Also examples of several images, of which a chunk has more than fit into its memory."""
    pairs = [partial(pair, raw / "0.png", raw / "1.png")] * (2 * decoding._CHUNK)
    examples = open_raw(str(raw / "all.jsonl"), None) * 16 + pairs
    one, two = (list(decoding.decode_examples(examples, 32, workers)) for workers in (0, 2))
    assert len(one) == len(two) == 16 * (GOOD + 4) + len(pairs)
    assert len(one) > 5 * decoding._CHUNK and two[-1].pixels.shape == (2, 32, 32, 3)
    for a, b in zip(one, two):
        assert a.parts == b.parts and a.error == b.error
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_a_refusal_leaves_no_file(raw, tmp_path):
    with pytest.raises(InputError, match="--codec=sd_vae needs the autoencoder: give --vae=DIR"):
        parser = argparse.ArgumentParser()
        prepare_data.add_arguments(parser)
        arguments = [f"--from={raw / 'all.jsonl'}", f"--to={tmp_path / 'r'}", "--processes=1"]
        arguments += ["--codec=sd_vae"]
        prepare_data.main(parser.parse_args(arguments))
    assert not (tmp_path / "r").exists()


def test_a_worker_process_that_is_ended_is_an_error():
    with pytest.raises(InputError, match="was ended; if the memory is too small, use fewer"):
        list(decoding.decode_examples([partial(os._exit, 1)], 32, workers=1))
