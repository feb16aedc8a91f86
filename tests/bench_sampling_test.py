"""The sampling benchmark: FLOP counts, JSON output, and equality of cached and uncached images."""

import json

import jax
import numpy as np
import pytest

from monoformer_jax.api import Model
from monoformer_jax.batch import stack
from monoformer_jax.bench import sampling
from monoformer_jax.bench.__main__ import main
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.models import monoformer

KEYS = {"seconds", "images", "steps", "prompt_tokens", "share_of_matmul", "uncached_seconds",
        "first_image_ms", "denoising_starts_ms", "images_per_s", "text_tokens_per_s",
        "prefix_cache_saves", "device", "dtype", "matmul_tflops"}  # fmt: skip


def test_needed_flops_match_the_weights_and_the_mask(config):
    c, tokenizer, evaluations = config.model, ByteTokenizer(), 7
    shapes = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))["decoder"]["layers"]
    matrices = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes) if len(x.shape) > 2)
    image = Image(np.zeros((8, 8, 1), np.float32), denoise=True)
    want = 0
    for parts in (["draw a one"], []):
        document = build_document([*parts, image], tokenizer, c.layout, closing=[])
        document = {name: x[:-1] for name, x in document.items()}  # without <|im_end|>
        mask = monoformer.attention_mask(c, stack([document], 64, tokenizer.pad_id))
        seen, again = np.asarray(mask.stop - mask.start)[0], 1 + document["denoise"] * 6
        want += 2 * matrices * again.sum()
        want += 4 * c.num_layers * c.num_heads * c.head_dim * (seen[: len(again)] * again).sum()
    assert sampling.needed_flops(config, len("draw a one") + 2, evaluations) == want


@pytest.mark.slow
def test_bench_writes_json_and_compares(config, tmp_path, monkeypatch, capsys):
    params = monoformer.init(config.model, jax.random.key(0))
    model = Model(
        config,
        params,
        ByteTokenizer(),
        image_processor=ImageProcessor(config.layout, config.data.image_size),
    )
    monkeypatch.setattr(sampling, "fresh_model", lambda dtype: model)
    monkeypatch.setattr(sampling, "TEXT_TOKENS", 4)
    for name, seconds, steps in (("other", 3.0, 2), ("elsewhere", 1.0, 50)):
        work = {"name": name, "seconds": seconds, "images": 1, "steps": steps, "prompt_tokens": 20}
        (tmp_path / f"{name}.json").write_text(json.dumps(work))
    file = tmp_path / "out" / "found.json"
    file.parent.mkdir()
    arguments = ["sampling", "--images=1", "--steps=2", "--prompt_tokens=20", "--repeats=1"]
    assert main([*arguments, f"--compare={tmp_path}", f"--json={file}"]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found) == KEYS
    assert found["uncached_seconds"] > 0
    assert found["prefix_cache_saves"] == 1 - found["seconds"] / found["uncached_seconds"]
    assert f"{3.0 / found['seconds']:15.2f}" in next(x for x in said.split("\n") if "other" in x)
    assert "elsewhere" not in said and "skipped 1 file(s) with another workload" in said


def test_bad_arguments_print_an_error(tmp_path, capsys):
    assert main(["sampling", f"--compare={tmp_path}"]) == 2
    assert "there is no JSON file" in capsys.readouterr().err
    (tmp_path / "x.json").write_text('{"name": "x"}')
    assert main(["sampling", f"--compare={tmp_path}"]) == 2
    assert "not have the format shown by --help (KeyError('seconds'))" in capsys.readouterr().err
    assert main(["sampling", f"--workdir={tmp_path}"]) == 2
    assert "holds no trained model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["sampling", "--steps=0"])
    assert stop.value.code == 2
