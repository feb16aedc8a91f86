"""monoformer_jax.load and Model, the README example, and the `sample` command."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import REFERENCE, ROOT
from fixtures import Folder, channels_last, close

import monoformer_jax
from monoformer_jax import api, sample
from monoformer_jax.api import Model
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.codecs.stable_diffusion import StableDiffusion
from monoformer_jax.data.documents import EndOfTurn, Features
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import OriginalConfig
from monoformer_jax.nn import autoencoder, clip
from monoformer_jax.pretrained import clip as clip_folder
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import claim_workdir
from monoformer_jax.sampling.session import Session

GRAY = PIL.Image.new("RGB", (30, 20), "gray")
TOWER = Folder(REFERENCE / "clip_tiny", "clip")


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """runs/digits with random weights that emit </s> at once, or <|im_start|> before it."""
    folder = tmp_path_factory.mktemp("somewhere") / "runs" / "digits"
    params = monoformer.init(config.model, jax.random.key(3))
    opens = jax.random.normal(jax.random.key(1), (config.model.embed_dim,))
    head = jnp.zeros_like(params["text_head"]).at[:, ByteTokenizer.im_start_id].set(opens)
    claim_workdir(folder, config)
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save_weights({"ema": lambda: params | {"text_head": head}})
    return folder


def readme_example():
    """The block of Python in the README that loads a model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "monoformer_jax.load(" in block]
    return block


@pytest.mark.slow
def test_the_example_of_the_readme_says_what_its_comments_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = {}
    exec(compile(readme_example(), "README.md", "exec"), said)
    assert said["texts"] == [" five"] and said["read"] == ["seven"]
    assert [picture.size for picture in said["sevens"]] == [(16, 16)] * 2
    # A further turn, and editing, for which the model is not trained.
    talk = [
        {"role": "user", "content": ["read this: ", said["sevens"][0]]},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "draw a two"},
    ]
    assert said["model"].chat(talk) == []
    assert said["model"].edit(GRAY, "darker", steps=1, output="numpy").shape == (16, 16, 3)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample", "--processes=1", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        sample.run_command("sample", sample.__doc__, sample.add_arguments, sample.main)
    return stopped.value.code


@pytest.mark.slow
def test_sample_reports_a_bad_prompt_and_answers_the_others(workdir, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("draw\n\n" + "long" * 100 + "\nread\n")
    out = tmp_path / "a.png"
    code = command(monkeypatch, f"--workdir={workdir}", f"--prompts={prompts}", f"--out={out}",
                   "--paint", "--steps=1", "--seed=5", f"--npz={tmp_path / 'a.npz'}")  # fmt: skip
    said = capsys.readouterr()
    assert code == 1
    assert "prompt 2, '': the prompt is empty" in said.err
    assert "prompt 3" in said.err and "has 402 tokens and 18 must follow" in said.err
    assert "'draw' -> '[picture 1]'" in said.out and "'read' -> '[picture 2]'" in said.out
    sidecar = json.loads(out.with_suffix(".json").read_text())
    assert sidecar["seed"] == 5 and sidecar["step"] == 0
    assert sidecar["config"]["sampling"]["steps"] == 1
    assert sidecar["rows"][1] == {"prompt": "read", "answer": [{"picture": 2}]}
    assert PIL.Image.open(out).size == (128, 256)
    with np.load(tmp_path / "a.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8

    # Shards on four devices: the same images for any number of processes.
    many = [f"--workdir={workdir}", "--prompt=draw", "--prompt=read", "--total=6", "--batch=4",
            "--steps=1", "--seed=5"]  # fmt: skip
    for process in (1, 0):
        options = [f"--out={tmp_path / 'many'}", "--processes=2", f"--process={process}"]
        assert command(monkeypatch, *many, *options) == 0
    with np.load(tmp_path / "many" / "samples.npz") as arrays:
        six = arrays["arr_0"].astype(int)
    assert six.shape == (6, 8, 8, 3) and np.abs(six[:2] - images).max() <= 1
    assert command(monkeypatch, *many[:-1], f"--out={tmp_path / 'many'}") == 2
    assert "generated with another seed" in capsys.readouterr().err


def test_the_import_is_light_and_lists_its_names():
    code = (
        "import sys, monoformer_jax; "
        "print([m for m in ('jax', 'numpy', 'torch', 'tensorflow') if m in sys.modules]); "
        "print(monoformer_jax.InputError.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\nInputError\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        monoformer_jax.paint  # noqa: B018


def random_model(config, weights=False, **changes):
    model = dataclasses.replace(config.model, **changes)
    config = dataclasses.replace(config, model=model)
    params = monoformer.init(model, jax.random.key(0)) if weights else {}
    return Model(
        config,
        params,
        ByteTokenizer(),
        image_processor=ImageProcessor(config.layout, config.data.image_size),
    )


def test_invalid_input_raises_one_sentence(config, tmp_path):
    model = random_model(config)
    user = {"role": "user", "content": "a"}
    (tmp_path / "text.png").write_text("no picture")
    for call, message in (
        (lambda: monoformer_jax.load(tmp_path), "holds no trained model"),
        (lambda: model.generate_text([]), "there is no prompt"),
        (lambda: model.generate_text(["ok", ""]), "prompt 2 is empty"),
        (lambda: model.generate_text("a" * 200), "has 201 tokens"),
        (lambda: model.generate_text("a", max_tokens=0), "max_tokens=0 must be above 0"),
        (lambda: model.generate_images("a", count=0), "count=0 must be above 0"),
        (lambda: model.generate_images("a", size=(16, 8)), "is 16×8, but the model was trained up"),
        (lambda: model.generate_images("a", steps=0), "steps=0 must be above 0"),
        (lambda: model.generate_images("a", guidance=-1.0), "guidance=-1.0 must be above 0"),
        (lambda: model.generate_images("a", solver="rk4"), "'rk4' does not sample"),
        (lambda: model.generate_images("a", step=3), "unknown setting step: choose from solver"),
        (lambda: model.generate_images("a", output="jpg"), "output='jpg' is not"),
        (lambda: model.edit(tmp_path / "text.png", "b"), "text.png\\) cannot be read as an image"),
        (lambda: model.edit(GRAY, ""), "prompt 1 is empty"),
        (lambda: model.edit(GRAY, 3), "the instruction must be a text"),
        (lambda: model.chat([]), "the last message must have the role user"),
        (lambda: model.chat([user, {"role": "assistant", "content": "b"}]), "the last message"),
        (lambda: model.chat([{"content": "a"}]), "message 1 is not"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_prompt_is_complete_unless_its_words_are_to_be_continued(change, monkeypatch):
    """What reaches the sampler: </s> after a prompt of a model that was trained so."""
    seen = []
    monkeypatch.setattr(
        api, "generate_text", lambda model, prompts, **_: seen.append(prompts) or []
    )
    monkeypatch.setattr(api, "generate_images", lambda model, prompts, **_: seen.append(prompts))

    class FakeSession:
        def __init__(self, *_, **__):
            pass

        def append(self, turns):
            seen.append(turns)

        def generate(self, *_, **__):
            return [[]]

    monkeypatch.setattr(api, "Session", FakeSession)
    for ends in (True, False):
        model = random_model(change(data={"end_of_prompt": ends}))
        monkeypatch.setattr(model.image_processor, "decode", lambda images: [])
        complete = [["pizza", *([EndOfTurn()] if ends else [])]]
        model.generate_text("pizza")
        model.generate_images("pizza")
        model.chat([{"role": "user", "content": "pizza"}])  # which is what the page calls
        model.generate_text("pizza", continue_prompt=True)
        assert seen == [complete] * 3 + [[["pizza"]]]
        seen.clear()


def test_a_missing_autoencoder_or_vision_encoder_is_reported(config):
    latents = random_model(config, channels=4)
    for call in (
        lambda: latents.generate_images("a"),
        lambda: latents.generate_text([[GRAY, "a"]]),
    ):
        with pytest.raises(
            InputError, match="latents of 4 channels: give its autoencoder with vae="
        ):
            call()
    seeing = random_model(config, channels=3, feature_dim=8)
    with pytest.raises(InputError, match="with a vision encoder: give its folder with vision="):
        seeing.chat([{"role": "user", "content": [GRAY, "what is it?"]}])


@pytest.mark.slow
def test_images_are_encoded_and_decoded_by_the_autoencoder(config):
    """Inputs become the normalized latent mean; generated latents are decoded to pixels."""
    c = autoencoder.AutoencoderConfig(widths=(8, 8), blocks=1, groups=4)
    params = autoencoder.init(c, jax.random.key(1))
    model = random_model(config, weights=True, channels=4)
    model.image_processor.codec = StableDiffusion(c, params)
    part = model.image_processor.encode(GRAY)
    pixels = np.full((1, 16, 16, 3), 128 / 127.5 - 1, np.float32)
    want = autoencoder.bind(c, params).encode(pixels).mean[0] * c.scale
    np.testing.assert_allclose(part.pixels, want, atol=1e-5)
    painted = model.generate_images([[GRAY, "b"]], steps=1, output="numpy", size=(8, 16))
    assert painted[0].shape == (8, 16, 3) and painted[0].dtype == np.uint8
    with pytest.raises(InputError, match="both must be multiples of 2"):
        model.generate_images("b", size=(7, 8))


@pytest.fixture(scope="module")
def seeing(config, tmp_path_factory):
    """Workdir of a text-only model with random weights and the recorded CLIP tower."""
    folder = tmp_path_factory.mktemp("seeing")
    model = dataclasses.replace(
        config.model,
        channels=3,
        feature_dim=TOWER.config["hidden_size"],
        original=OriginalConfig(context_images="causal"),
    )
    params = monoformer.init(model, jax.random.key(3))
    letters = np.isin(np.arange(model.padded_vocab), ByteTokenizer().encode("abcdefghijklmnop"))
    claim_workdir(folder, dataclasses.replace(config, model=model))
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save_weights(
            {"ema": lambda: params | {"text_head": params["text_head"] * letters}}
        )
    return folder


def recorded_features():
    """A recorded image, and the features of its recorded pixels; see parity_vision_test."""
    recorded = TOWER.cases["preprocess"]
    c = clip_folder.read_config(TOWER.config)
    shapes = jax.eval_shape(lambda: clip.init(c, jax.random.key(0)))
    tower = clip.bind(c, TOWER.params(clip_folder.table(c), shapes))
    pixels = channels_last(recorded["pixel_values"])
    return recorded["image_u8"], np.asarray(jax.jit(tower.features)(pixels)[0])


@pytest.mark.slow
def test_input_images_are_encoded_by_the_vision_encoder(seeing, tmp_path, monkeypatch, capsys):
    """In `generate_text`, `chat` and `sample --vision`: the answer equals that to the features."""
    picture, features = recorded_features()
    model = monoformer_jax.load(seeing, vision=TOWER.path)
    close(model.image_processor.encode(picture).values, features, 1e-4)

    def ask(*content):
        return model.chat([{"role": "user", "content": list(content)}], max_tokens=8)

    session = Session(model, 1, reencode=model.image_processor.reencode)
    session.append([["what is it? ", Features(features)]])
    (want,) = session.generate(max_tokens=8)
    assert len(want[0]) == 8 and ask("what is it? ", picture) == want
    other = ask("what is it? ", 255 - picture)
    assert len(other[0]) == 8 and other != want

    file = tmp_path / "a.png"
    PIL.Image.fromarray(picture).save(file)
    run = [f"--workdir={seeing}", "--prompt=what is it? ", f"--image={file}", "--max_tokens=8"]
    assert command(monkeypatch, *run, f"--vision={TOWER.path}") == 0
    assert capsys.readouterr().out == f"'what is it? ' -> {want[0]!r}\n"

    file.write_bytes(file.read_bytes()[:99])
    assert command(monkeypatch, *run, f"--vision={TOWER.path}") == 2
    assert "a.png) cannot be read as an image" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"the image of message 1 .*a\.png.* cannot be read"):
        ask("what is it? ", file)


def test_a_tower_of_another_model_is_refused(config, tmp_path):
    model = dataclasses.replace(config.model, feature_dim=8)
    for folder, message in (
        (tmp_path / "none", "none is not a folder"),
        (tmp_path, "has no config.json"),
        (TOWER.path, "clip_tiny has 48 features, the model takes 8"),
    ):
        with pytest.raises(InputError, match=message):
            ImageProcessor(model.layout, config.data.image_size, None, folder)
