"""The input pipeline benchmark: keys, counts of known rows, and the data of a config."""

import json

import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.bench import input_pipeline
from monoformer_jax.bench.__main__ import main
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer

KEYS = {"documents_per_s", "tokens_per_s", "images_per_s", "real_token_share",
        "bytes_per_document_slope"}  # fmt: skip


def test_the_example_run_has_one_image_and_its_caption_a_document(tmp_path):
    config = input_pipeline.example_config(tmp_path)
    batch = next(Batches(config, ByteTokenizer(), range(4)).iterator)
    documents, images, real, tokens = input_pipeline.count(batch)
    assert (documents, images, tokens) == (4, 4, 4 * 512)  # two documents do not fit in a row
    assert 4 * 260 < real < 4 * 320 and config.streams == 64


@pytest.mark.slow
def test_bench_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(input_pipeline, "JPEGS", 32)
    monkeypatch.setattr(input_pipeline, "ROUNDS", 1)
    file, config = tmp_path / "found.json", ROOT / "configs" / "digits.py:tiny"
    options = ["--seconds=0.2", "--documents=50", "--workers=1", "--host_rows=2"]
    command = ["input_pipeline", f"--config={config}", *options, "--json", str(file)]
    assert main(command) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found) > KEYS and "digits: 2 of 4 rows of 160 tokens, 1 streams" in said
    assert all(np.isfinite(value) for value in found.values())
    assert 0.9 < found["real_token_share"] <= 1
    assert found["documents_per_s"] > found["images_per_s"] > 0  # `say` has no image
    assert found["tokens_per_s"] == pytest.approx(
        2 * 160 * found["real_token_share"] / found["batch_ms"] * 1e3, rel=1e-6
    )
    assert main([*command, "--host_rows=5"]) == 2
    assert "--host_rows=5 is above batch_size=4" in capsys.readouterr().err
