"""Datasets to records to batches: raw forms, crops, latents, what is learned, and bad input."""

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
from monoformer_jax.config import Config, DataConfig, ModelConfig, named_size
from monoformer_jax.data.documents import Image, build
from monoformer_jax.data.image_io import crop
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.raw import open_raw
from monoformer_jax.data.records import Example, Records
from monoformer_jax.data.sources import conversation, open_sources
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.nn import autoencoder
from monoformer_jax.pretrained import sd_vae
from monoformer_jax.training.losses import draw_latents

VAE = REFERENCE / "vae_tiny16"
LINES = [
    {"image": "a.png", "captions": ["red", "a red square"]},
    {"img_path": "./b.png", "prompt": "blue"},
    {"image": "a.png", "messages": ["colour?", "red", "sure?", "yes"]},
    {"id": "7", "data": ["hi", "hello"]},
    {"image": "b.png", "conversations": [{"value": "<image>\nwhat?"}, {"value": "blue"}]},
    {"image": "gone.png", "captions": ["lost"]},
    {"nothing": 1},
]


def encode(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "monoformer_jax.encode_latents", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Seven lines of every form, two of which cannot be read, and their pictures."""
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
    out = encode(f"--from={raw / 'all.jsonl'}", f"--to={to}", f"--vae={VAE}", "--image_size=32",
                 "--per_file=3", "--batch_size=2")  # fmt: skip
    assert "5 examples in 3 files; 3 could not be read and were left out" in out
    assert "gone.png" in out and "all.jsonl:7 has no captions" in out and "all.jsonl:8" in out
    return to


def settings(folder, **data):
    data = {"mixture": {"mine": 1.0}, "records": {"mine": str(folder)}, "max_seq_len": 80} | data
    model = ModelConfig(**named_size("tiny") | {"channels": 4})
    return Config(batch_size=2, model=model, data=DataConfig(image_size=16, **data))


@pytest.mark.slow
def test_every_form_becomes_a_record(raw, records):
    found = {(e.captions and e.captions[0]) or e.messages[0]: e for e in
             (Records(str(records))[i] for i in range(5))}  # fmt: skip
    assert found.keys() == {"red", "Please generate an image of blue", "colour?", "hi", "what?"}
    assert list(found["red"].captions) == ["red", "a red square"]
    assert list(found["colour?"].messages) == ["colour?", "red", "sure?", "yes"]
    assert found["hi"].mean is None
    # The latent is the autoencoder's own, scaled; half precision keeps three digits.
    config, params = sd_vae.load(VAE)
    pixels = crop(PIL.Image.open(raw / "a.png"), 32)
    want = autoencoder.bind(config, params).encode(pixels[None])
    for name in ("red", "colour?"):
        np.testing.assert_allclose(found[name].mean, want.mean[0] * config.scale, atol=2e-3)
        logvar = want.log_variance[0] + 2 * np.log(config.scale)
        np.testing.assert_allclose(found[name].logvar, logvar, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_records_train_as_rows(records):
    config = dataclasses.replace(settings(records, sample_latents=True), batch_size=8)
    tokenizer = ByteTokenizer()
    batches = Batches(config, tokenizer)
    for _ in range(3):
        batch = next(batches.iterator)
        contract.check(batch, contract.spec(config), config.max_images)
    at_patch = batch["token_types"] == PATCH
    assert (batch["patch_logvar"][at_patch] != 0).all(-1).any()
    assert (batch["patch_logvar"][~at_patch] == 0).all()
    plain = next(Batches(settings(records), tokenizer).iterator)
    assert plain["patch_logvar"].shape[-1] == 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_finished_one_is_left_alone(raw, records):
    files = sorted(records.glob("*.array_record"))
    before, kept = [file.read_bytes() for file in files], files[0].stat().st_mtime_ns
    files[1].unlink()
    arguments = (f"--from={raw / 'all.jsonl'}", f"--to={records}", f"--vae={VAE}",
                 "--image_size=32", "--per_file=3", "--batch_size=2")  # fmt: skip
    with pytest.raises(InputError, match="has 2 files of records, 3 were written"):
        Records(str(records))
    assert "is finished; nothing was touched" in encode(*arguments, code=2)
    (records / "info.json").unlink()
    with pytest.raises(InputError, match="holds no finished records"):
        Records(str(records))
    encode(*arguments)
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == kept


def test_the_forms_of_a_conversation_and_what_of_it_is_learned(tmp_path):
    config = settings(tmp_path)
    example = Example(messages=["colour?", "red", "sure?", "yes"], mean=np.zeros((2, 2, 4), "f2"),
                      logvar=np.zeros((2, 2, 4), "f2"))  # fmt: skip
    again = Example.unpack(example.pack())
    assert list(again.messages) == list(example.messages) and again.mean.shape == (2, 2, 4)
    parts = [Image(np.zeros((2, 2, 4)), denoise=False), *conversation(example.messages)]
    tokenizer = ByteTokenizer()
    document = build(parts, tokenizer, config.model)
    learned = document["targets"][document["target_weights"] > 0]
    ids = tokenizer.encode
    end, eos = tokenizer.im_end_id, tokenizer.eos_id
    start = tokenizer.im_start_id
    assert learned.tolist() == [start, end, *ids("red"), eos, *ids("yes"), eos]
    assert tokenizer.decode(document["tokens"]).count("### Human: ") == 2


def test_latents_are_drawn_at_patches_alone():
    """Mean and deviation of many draws."""
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
    """Three stripes, twice the size: the middle one stays."""
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128, 0], pixels[:, :64, 1], pixels[:, 128:, 2] = 255, 255, 255
    got = crop(PIL.Image.fromarray(pixels), 32)
    assert got.shape == (32, 32, 3)
    np.testing.assert_array_equal(got[..., 0], 1)
    assert (got[:, 2:-2, 1:] == -1).all()


def test_class_folders_are_numbered_by_name(tmp_path):
    for name, count in (("n02", 1), ("n01", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.JPEG").write_bytes(b"")
    examples = open_raw(str(tmp_path), ["cat", "dog"])
    assert [example().captions[1] for example in examples] == ["cat", "cat", "dog"]
    with pytest.raises(InputError, match="has 2 folders of classes, there are names for 3"):
        open_raw(str(tmp_path), ["cat", "dog", "cow"])
    with pytest.raises(InputError, match="has numbered classes: give their names with --labels"):
        open_raw(str(tmp_path), None)
    with pytest.raises(InputError, match="is no folder, no file and not tfds:NAME/SPLIT"):
        open_raw(str(tmp_path / "no"), None)


def test_a_dataset_of_tensorflow_datasets(monkeypatch):
    """Its package stands in here: rows as data_source gives them, the image undecoded."""
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
    assert asked == [("pets", "test", ["image"])] and example().captions[1] == "dog"
    assert (crop(example().image(), 16) == 1).all()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'monoformer_jax\[tfds\]'"):
        open_raw("tfds:pets/test", ["cat", "dog"])


def test_records_that_do_not_fit_the_config(tmp_path, raw):
    with pytest.raises(InputError, match=r"--config.data.records.other=DIR"):
        open_sources(dataclasses.replace(settings(tmp_path).data, mixture={"other": 1.0}))
    out = encode(f"--from={raw / 'all.jsonl'}", f"--to={tmp_path / 'r'}", code=2)
    assert "there are pictures: give the autoencoder with --vae=DIR" in out
    assert not list(tmp_path.glob("r/*.json"))


@pytest.mark.slow
def test_latents_of_another_size(records):
    with pytest.raises(InputError, match=r"holds latents of 16×16, but data.image_size=32"):
        open_sources(dataclasses.replace(settings(records).data, image_size=32))
