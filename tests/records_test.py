"""Datasets to records to batches: input formats, crops, latents, text with loss, invalid input."""

import dataclasses
import io
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import REFERENCE, ROOT

from monoformer_jax import batch as contract
from monoformer_jax.batch import PATCH
from monoformer_jax.config import Config, DataConfig, TokenLayout
from monoformer_jax.data.documents import (
    EndOfTurn,
    Image,
    Prompt,
    UntrainedText,
    build_document,
    draw_prompts,
)
from monoformer_jax.data.image_io import open_image, to_pixels
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.raw import RawImage, open_raw
from monoformer_jax.data.records import Records, pack, unpack
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.templates import chat_parts, complete_prompt
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import named_size
from monoformer_jax.models.monoformer import MonoFormerConfig
from monoformer_jax.nn import autoencoder
from monoformer_jax.pretrained import sd_vae
from monoformer_jax.training.losses import draw_latents

VAE = REFERENCE / "vae_tiny16"
TALK = [{"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(["colour?", "red", "sure?", "yes"])]  # fmt: skip
LINES = [
    {"image": "a.png", "captions": ["red", "a red square"]},
    {"img_path": "./b.png", "prompt": "blue"},
    {"image": "a.png", "messages": ["colour?", "red", "sure?", "yes"]},
    {"id": "7", "data": ["hi", "hello"]},
    {
        "image": "b.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "blue"},
        ],
    },
    {"image": "gone.png", "captions": ["lost"]},
    {"id": "nothing"},
]


def encode(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "monoformer_jax.prepare_data", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Seven lines of all formats, two of which cannot be read, and their images."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for name in "ab":
        pixels = rng.integers(0, 255, (40, 56, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "all.jsonl").write_text("\n".join(json.dumps(line) for line in LINES) + "\n{broken\n")
    return folder


@pytest.fixture(scope="module")
def records(raw):
    to = raw / "records"
    out = encode(f"--from={raw / 'all.jsonl'}", f"--to={to}", "--codec=sd_vae", f"--vae={VAE}",
                 "--image_size=32", "--per_file=3", "--batch_size=2")  # fmt: skip
    assert "5 examples in 3 files; 3 could not be read and were skipped" in out
    assert "gone.png" in out and "all.jsonl:7 has no captions" in out and "all.jsonl:8" in out
    return to


def settings(folder, **data):
    data = {"mixture": {"mine": 1.0}, "records": {"mine": str(folder)}, "max_seq_len": 80} | data
    model = MonoFormerConfig(**named_size("tiny") | {"channels": 4})
    return Config(batch_size=2, model=model, data=DataConfig(image_size=16, **data))


@pytest.mark.slow
def test_every_form_becomes_a_record(raw, records):
    found, source = {}, Records(str(records))
    for example in (source[i] for i in range(len(source))):
        texts = [part for part in example if not isinstance(part, Image)]
        prompt = isinstance(texts[0], Prompt)
        found[texts[0].texts[0] if prompt else texts[1].text] = example
    assert found.keys() == {"red", "Please generate an image of blue", "colour?", "hi", "what?"}
    prompt, image = found["red"]
    assert prompt == Prompt(("red", "a red square")) and image.denoise
    look, *talk = found["colour?"]
    assert not look.denoise and talk == chat_parts(TALK)[:-1]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert found["hi"] == chat_parts(turns)[:-1]
    # The latent is that of the autoencoder, normalized; float16 has three digits.
    config, params = sd_vae.load(VAE)
    pixels = to_pixels(open_image(raw / "a.png"), 32)
    want = autoencoder.bind(config, params).encode(pixels[None])
    for part in (image, look):
        np.testing.assert_allclose(part.pixels, want.mean[0] * config.scale, atol=2e-3)
        logvar = want.log_variance[0] + 2 * np.log(config.scale)
        np.testing.assert_allclose(part.logvar, logvar, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_records_train_as_rows(records):
    config = dataclasses.replace(settings(records, sample_latents=True), batch_size=8)
    tokenizer = ByteTokenizer()
    batches = Batches(config, tokenizer)
    for _ in range(3):
        batch = next(batches.iterator)
        contract.check(
            batch,
            contract.spec(config.layout, config.batch_size, config.data.max_seq_len),
            config.max_images,
            config.layout.vocab_size,
        )
    at_patch = batch["token_types"] == PATCH
    assert (batch["patch_logvar"][at_patch] != 0).all(-1).any()
    assert (batch["patch_logvar"][~at_patch] == 0).all()
    plain = next(Batches(settings(records), tokenizer).iterator)
    assert plain["patch_logvar"].shape[-1] == 0


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_a_complete_one_is_not_changed(raw, records):
    files = sorted(records.glob("*.array_record"))
    before, kept = [file.read_bytes() for file in files], files[0].stat().st_mtime_ns
    files[1].unlink()
    arguments = (f"--from={raw / 'all.jsonl'}", f"--to={records}", "--codec=sd_vae", f"--vae={VAE}",
                 "--image_size=32", "--per_file=3", "--batch_size=2")  # fmt: skip
    with pytest.raises(InputError, match="has 2 record files, but 3 were written"):
        Records(str(records))
    assert "is already complete; nothing was changed" in encode(*arguments, code=2)
    (records / "info.json").unlink()
    with pytest.raises(InputError, match="has no complete records"):
        Records(str(records))
    encode(*arguments)
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == kept


def test_conversation_formats_and_which_text_has_a_loss(tmp_path):
    config = settings(tmp_path)
    zeros = np.zeros((2, 2, 4), np.float32)
    example = [Image(zeros, denoise=False, logvar=zeros), *chat_parts(TALK)[:-1]]
    again = unpack(pack(example))
    assert again[1:] == example[1:] and again[0].pixels.shape == (2, 2, 4)
    tokenizer = ByteTokenizer()
    document = build_document(again, tokenizer, config.layout)
    learned = document["targets"][document["target_weights"] > 0]
    ids = tokenizer.encode
    end, eos = tokenizer.im_end_id, tokenizer.eos_id
    start = tokenizer.im_start_id
    assert learned.tolist() == [start, end, *ids("red"), eos, *ids("yes"), eos]
    assert tokenizer.decode(document["tokens"]).count("### Human: ") == 2


PARTS = [{"image": "a.png"}, {"prompt": ["make it red", "red, please"]},
         {"image": "b.png", "generate": True}, {"text": "done", "train": False},
         {"end_of_turn": True}, {"text": "yes"}]  # fmt: skip


def test_an_example_is_any_list_of_parts(tmp_path):
    """From a line of JSON to a record and back: order, text with loss, and generated images."""
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"parts": PARTS}) + "\n")
    (example,) = open_raw(str(file), None)
    image = np.zeros((2, 2, 4), np.float32)
    parts = [Image(image, p.denoise) if isinstance(p, RawImage) else p for p in example().parts]
    look, *words, made, read, turn, said = unpack(pack(parts))
    assert (look.denoise, made.denoise) == (False, True)
    assert words == [Prompt(("make it red", "red, please"))]
    assert (read, turn, said) == (UntrainedText("done"), EndOfTurn(), "yes")
    for part, message in (
        ({"text": 1}, "is none of text"), ({"image": "a.png", "paint": True}, "is none of text"),
        ({"end_of_turn": False}, "is none of text"), ("hi", "is none of text"),
    ):  # fmt: skip
        file.write_text(json.dumps({"parts": [part]}) + "\n")
        with pytest.raises(InputError, match=f"edits.jsonl:1: the part .* {message}"):
            open_raw(str(file), None)[0]()


def test_roles_of_messages(tmp_path):
    file = tmp_path / "talks.jsonl"
    system = {"role": "system", "content": "Be brief. "}
    file.write_text(json.dumps({"messages": [system, *TALK]}) + "\n")
    (example,) = open_raw(str(file), None)
    assert example().parts == [UntrainedText("Be brief. "), *chat_parts(TALK)[:-1]]
    for wrong in (TALK[:1], TALK[1:], [system], ["one"], []):
        file.write_text(json.dumps({"messages": wrong}) + "\n")
        with pytest.raises(InputError, match="user and assistant must alternate"):
            open_raw(str(file), None)[0]()


def test_a_prompt_is_drawn_dropped_and_marked_as_complete():
    """The prompt is `pizza` and </s>, followed by the image."""
    rng, parts = np.random.default_rng(0), [Prompt(("pizza", "a pizza")), "rest"]
    drawn = [draw_prompts(parts, rng, 0.25, True) for _ in range(400)]
    assert {tuple(d[:-2]) for d in drawn if len(d) == 3} == {("pizza",), ("a pizza",)}
    assert all(d[-2:] == [EndOfTurn(), "rest"] for d in drawn if len(d) == 3)
    assert 70 < sum(d == ["rest"] for d in drawn) < 130
    assert draw_prompts(parts[:1], rng, 0.0, False)[0] in ("pizza", "a pizza")
    tokenizer, layout = ByteTokenizer(), TokenLayout(262, 1, 2)
    image = Image(np.zeros((2, 2, 1), np.float32), denoise=True)
    document = build_document(["pizza", EndOfTurn(), image], tokenizer, layout)
    prompt = build_document(complete_prompt(["pizza"], True), tokenizer, layout, closing=[])
    n = len(prompt["tokens"])
    assert prompt["tokens"].tolist() == document["tokens"][:n].tolist()
    # The token after the prompt, <|im_start|>, always has a loss.
    assert document["targets"][n - 1] == tokenizer.im_start_id and document["target_weights"][n - 1]


def test_latents_are_drawn_at_patches_alone():
    """Mean and standard deviation of many samples."""
    token_types = jnp.array([[1, 2, 3, 3, 0]])
    at_patch = (token_types == PATCH)[..., None]
    batch = {"token_types": token_types, "patches": jnp.where(at_patch, 2.0, 0.0) * jnp.ones((1, 5, 4)),
             "patch_logvar": jnp.where(at_patch, np.log(0.25), 0.0) * jnp.ones((1, 5, 4))}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: draw_latents(key, batch)["patches"])(keys)
    assert (drawn[:, :, [0, 1, 4]] == 0).all()
    drawn = np.asarray(drawn[:, 0, 2:4])
    np.testing.assert_allclose(drawn.mean(0), 2.0, atol=0.05)
    np.testing.assert_allclose(drawn.std(0), 0.5, atol=0.03)
    bare = batch | {"patch_logvar": jnp.zeros((1, 5, 0))}
    assert draw_latents(keys[0], bare)["patches"] is bare["patches"]


def test_crop_takes_the_central_square():
    """Three stripes at twice the size: the middle one remains."""
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128, 0], pixels[:, :64, 1], pixels[:, 128:, 2] = 255, 255, 255
    got = to_pixels(PIL.Image.fromarray(pixels), 32)
    assert got.shape == (32, 32, 3)
    np.testing.assert_array_equal(got[..., 0], 1)
    assert (got[:, 2:-2, 1:] == -1).all()


def test_class_folders_are_numbered_by_name(tmp_path):
    for name, count in (("n02", 1), ("n01", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.JPEG").write_bytes(b"")
    examples = open_raw(str(tmp_path), ["cat", "dog"])
    assert [example().parts[0].texts[1] for example in examples] == ["cat", "cat", "dog"]
    with pytest.raises(InputError, match="has 2 class folders, but there are 3 class names"):
        open_raw(str(tmp_path), ["cat", "dog", "cow"])
    with pytest.raises(InputError, match="has numbered classes: give their names with --labels"):
        open_raw(str(tmp_path), None)
    with pytest.raises(InputError, match="is not a folder, a file or tfds:NAME/SPLIT"):
        open_raw(str(tmp_path / "no"), None)


def test_a_dataset_of_tensorflow_datasets(monkeypatch):
    """With a fake package: rows as returned by data_source, with undecoded images."""
    png = io.BytesIO()
    PIL.Image.fromarray(np.full((20, 30, 3), 255, np.uint8)).save(png, "PNG")
    asked = []

    def data_source(name, split, decoders):
        asked.append((name, split, list(decoders)))
        return [{"image": png.getvalue(), "label": np.int64(1)}]

    decode = types.SimpleNamespace(SkipDecoding=object)
    package = types.SimpleNamespace(data_source=data_source, decode=decode)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", package)
    (example,) = open_raw("tfds:pets/test", ["cat", "dog"])
    assert asked == [("pets", "test", ["image"])] and example().parts[0].texts[1] == "dog"
    assert (to_pixels(example().parts[1].open(), 16) == 1).all()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'monoformer_jax\[tfds\]'"):
        open_raw("tfds:pets/test", ["cat", "dog"])


def test_records_that_do_not_fit_the_config(tmp_path, raw):
    with pytest.raises(InputError, match=r"--config.data.records.other=DIR"):
        open_sources(dataclasses.replace(settings(tmp_path).data, mixture={"other": 1.0}), 4)
    lines = f"--from={raw / 'all.jsonl'}"
    out = encode(lines, f"--to={tmp_path / 'r'}", "--codec=sd_vae", code=2)
    assert "--codec=sd_vae needs the autoencoder: give --vae=DIR" in out
    assert not list(tmp_path.glob("r/*.json"))


@pytest.mark.slow
def test_latents_of_another_size(records):
    with pytest.raises(InputError, match=r"holds images of 16×16×4, but data.image_size=32 and"):
        open_sources(dataclasses.replace(settings(records).data, image_size=32), 4)
