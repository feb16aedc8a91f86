"""CLIP against recorded outputs of transformers, CLIP scores, and the folders of benchmarks."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import tokenizers
from conftest import ROOT
from etils import epath
from fixtures import close, run

from monoformer_jax import evaluate, sample
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation.clip_score import ClipScore
from monoformer_jax.evaluation.image_set import open_image_set
from monoformer_jax.evaluation.prompts import prompts_of, read_prompts, write_benchmark
from monoformer_jax.models import monoformer
from monoformer_jax.nn import clip
from monoformer_jax.pretrained.clip import dual_table, load_dual, read_dual_config
from monoformer_jax.pretrained.folder import write_safetensors
from monoformer_jax.pretrained.table import Tensor, write_tensors
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import claim_workdir

# Of transformers 5.24's CLIPModel in float64 (torch 2.14) with the weights of `tensor`.
RECORDED = ROOT / "tests" / "data" / "clip.npz"
WORDS = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "[unk]"]
CONFIG = {
    "model_type": "clip", "projection_dim": 20,
    "text_config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 3, "max_position_embeddings": 12, "vocab_size": 40},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
                      "patch_size": 7},
}  # fmt: skip


def tensor(name, shape):
    """The weights of a seeded formula, as in the recorded network."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    else:
        values = values * (1 / np.prod(shape[1:])) ** 0.5
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete CLIP in the files of transformers; a letter is a token."""
    folder = tmp_path_factory.mktemp("clip")
    config = read_dual_config(CONFIG)
    shapes = jax.eval_shape(lambda: clip.init(config, jax.random.key(0)))
    tensors = {
        name: Tensor(x.shape, x.dtype, lambda name=name, x=x: tensor(name, x.shape))
        for name, x in write_tensors(dual_table(config), shapes, np.dtype(np.float32)).items()
    }
    tensors["logit_scale"] = Tensor((), np.dtype(np.float32), lambda: np.float32(2.66))
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocab = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[unk]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(word, vocab[word]) for word in WORDS[:2]],
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_embeddings_equal_the_recorded_ones(folder):
    model = clip.bind(*load_dual(folder))
    with np.load(RECORDED) as recorded:
        texts = jax.jit(model.embed_texts)(recorded["tokens"], recorded["lengths"])
        close(texts, recorded["texts"], 1e-5)
        close(jax.jit(model.embed_images)(recorded["pixels"]), recorded["images"], 1e-5)
        # What follows <|endoftext|> is not read.
        changed = np.where(np.arange(12) < recorded["lengths"][:, None], recorded["tokens"], 3)
        np.testing.assert_array_equal(
            jax.jit(model.embed_texts)(changed, recorded["lengths"]), texts
        )


def pictures(count, size=28):
    return np.random.default_rng(0).integers(0, 255, (count, size, size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def measure(folder):
    return ClipScore(folder)


def test_scores_are_cosines(folder, measure):
    """By the embeddings of single pictures and prompts; too long prompts are cut and counted."""
    images = pictures(5)
    prompts = ["a b", "c", "", "a b c d e f g h i j k l m n", "z z"]
    model = clip.bind(*load_dual(folder))
    embed_texts, embed_images = jax.jit(model.embed_texts), jax.jit(model.embed_images)
    want = []
    for image, prompt in zip(images, prompts):
        ids = [0, *(WORDS.index(word) for word in prompt.split()[:10]), 1]
        padded = np.pad(np.array([ids]), [(0, 0), (0, 12 - len(ids))])
        text = embed_texts(padded, np.array([len(ids)]))
        pixels = (image / 255 - clip.MEAN) / clip.STD
        cosine = float((embed_images(pixels[None].astype(np.float32)) * text).sum())
        want.append(100 * max(cosine, 0))
    close(measure(images, prompts), want, 1e-3)
    assert min(want) == 0 < max(want) and measure.cut == 1
    assert measure.name.startswith("CLIP ViT/7 28 ")


def write_pictures(folder, images, prompts=None):
    folder.mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{number:05}.png")
    if prompts is not None:
        rows = [{"prompt": x, "answer": ["see ", {"picture": i}]} for i, x in enumerate(prompts, 1)]
        (folder / "samples.json").write_text(json.dumps({"rows": rows}))
    return folder


def test_evaluate_finds_the_prompts_of_sample(folder, measure, tmp_path, capsys):
    images, prompts, file = pictures(4), ["a", "b c", "d", "e"], tmp_path / "scores.json"
    made = write_pictures(tmp_path / "made", images, prompts)
    run(evaluate, f"--images={made}", f"--clip={folder}", f"--json={file}")
    scores = json.loads(file.read_text())
    assert scores["clip_score"] == pytest.approx(measure(images, prompts).mean(), abs=1e-4)
    assert scores["clip"] == measure.name and "frechet" not in scores
    assert f"CLIP score, 100 times the cosine, by {measure.name}" in capsys.readouterr().out
    # Of another program's pictures, and beside a reference.
    other, lines = write_pictures(tmp_path / "other", images), tmp_path / "lines.txt"
    lines.write_text("b c\na\n")
    run(evaluate, f"--images={other}", f"--clip={folder}", f"--prompts={lines}", f"--json={file}",
        f"--reference={made}")  # fmt: skip
    scores = json.loads(file.read_text())
    want = measure(images, ["b c", "a"] * 2).mean()
    assert scores["clip_score"] == pytest.approx(want, abs=1e-4) and scores["frechet"] < 1e-6


def test_what_has_no_clip_score_is_refused(folder, tmp_path):
    other = write_pictures(tmp_path / "other", pictures(4))
    lines, bad = tmp_path / "three.txt", tmp_path / "bad.jsonl"
    lines.write_text("a\nb\nc")
    bad.write_text('{"prompt": "a"}\n{"tag": "b"}\n')
    (vision := tmp_path / "vision").mkdir()
    (vision / "config.json").write_text(json.dumps(CONFIG["vision_config"]))
    a, b = f"--images={other}", f"--clip={folder}"
    for arguments, sentence in (
        ([a, b], "no samples.json of `sample` has the prompts of its 4 pictures: give --prompts"),
        ([a, b, f"--prompts={lines}"], "has 3 prompts for the 4 pictures"),
        ([a, b, f"--prompts={bad}"], 'line 2: it is not a JSON object with a "prompt"'),
        ([a, b, f"--prompts={tmp_path}/none.txt"], "none.txt: no such file"),
        ([a, b, f"--prompts={other}"], "other has no .txt files"),
        ([a, f"--reference={other}", f"--prompts={lines}"], "is of the CLIP score: give --clip"),
        ([a, b, "--statistics=x.npz"], "are those of --reference: give it"),
        ([a, f"--clip={vision}", f"--prompts={tmp_path / 'two.txt'}"], "is not clip, a model with"),
    ):
        (tmp_path / "two.txt").write_text("a\nb")
        with pytest.raises(InputError, match=sentence):
            run(evaluate, *arguments)


def benchmark_prompts(kind, folder):
    if kind == "geneval":
        path = folder / "evaluation_metadata.jsonl"
        path.write_text('{"tag": "counting", "prompt": "two"}\n{"prompt": "a \\u2028 b"}\n')
        return path
    for name in ("10", "9"):
        (folder / f"{name}.txt").write_text(f"picture {name}\n", encoding="utf-8-sig")
    return folder


@pytest.mark.parametrize("kind", ["geneval", "dpg"])
def test_folders_of_benchmarks(tmp_path, kind):
    """The pictures of each prompt, where the scripts of GenEval and DPG-Bench look for them."""
    (source := tmp_path / "prompts").mkdir()
    prompts, images = read_prompts(benchmark_prompts(kind, source)), pictures(8, 4)
    np.savez(tmp_path / "samples.npz", images)
    made = Path(write_benchmark(kind, epath.Path(tmp_path / "samples.npz"), prompts, 4))
    files = sorted(str(x.relative_to(made)) for x in made.rglob("*") if x.is_file())
    if kind == "geneval":
        assert files == [f"0000{p}/{x}" for p in range(2) for x in (
            "metadata.jsonl", *(f"samples/000{i}.png" for i in range(4)))]  # fmt: skip
        found = [PIL.Image.open(x) for x in sorted(made.rglob("*.png"))]
        lines = [json.loads((made / f"0000{p}" / "metadata.jsonl").read_text()) for p in range(2)]
        assert lines == [{"tag": "counting", "prompt": "two"}, {"prompt": "a \u2028 b"}]
    else:
        assert files == ["10.png", "9.png"] and prompts[0].text == "picture 10"
        corners = [(0, 0), (4, 0), (0, 4), (4, 4)]  # left, upper: as its script crops
        found = [
            PIL.Image.open(made / name).crop((x, y, x + 4, y + 4))
            for name in files
            for x, y in corners
        ]
    np.testing.assert_array_equal(np.stack([np.asarray(x) for x in found]), images)


@pytest.mark.slow
def test_sample_draws_a_benchmark(config, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    claim_workdir(workdir, config)
    with Checkpoints(workdir, 1) as checkpoints:
        params = monoformer.init(config.model, jax.random.key(0))
        checkpoints.save_weights({"ema": lambda: params})
    path = benchmark_prompts("geneval", tmp_path)
    common = [f"--workdir={workdir}", f"--prompts={path}", "--steps=1", f"--out={out}",
              "--processes=1"]  # fmt: skip
    for wrong, sentence in (
        (["--benchmark=dpg"], "needs --prompts, the folder of its prompts"),
        (["--benchmark=geneval", "--total=3"], "--total and --benchmark exclude each other"),
        (["--benchmark=geneval", "--json=a.json"], "leave out --json"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(sample, *common, *wrong)
    assert not out.exists()
    run(sample, *common, "--benchmark=geneval", "--count=3", "--batch=4")
    images = open_image_set(epath.Path(out / "samples.npz"))
    assert prompts_of(images, path) == ["two"] * 3 + ["a \u2028 b"] * 3
    (array,) = images.batches(6)
    drawn = [np.asarray(PIL.Image.open(x)) for x in sorted((out / "geneval").rglob("*.png"))]
    np.testing.assert_array_equal(np.stack(drawn), array)
    assert len({x.tobytes() for x in array}) == 6
    path.write_text(path.read_text().replace("two", "three"))
    with pytest.raises(InputError, match="was generated from other prompts"):
        prompts_of(images, path)
