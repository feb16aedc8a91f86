"""The training benchmark: model FLOPs against a count in loops, and JSON output."""

import json

import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.attention import interval_mask
from monoformer_jax.batch import PAD, PATCH
from monoformer_jax.bench.__main__ import main
from monoformer_jax.bench.training import SMALL, model_flops, random_rows
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer

KEYS = {"step_ms", "tokens_per_s", "images_per_s", "model_tflops", "matmul_tflops",
        "share_of_matmul", "peak_rss_gib", "data_wait_share"}  # fmt: skip


def test_model_flops_count_real_tokens_and_visible_pairs(config):
    batch, c = next(Batches(config, ByteTokenizer()).iterator), config.model
    mask = interval_mask(batch["token_types"], batch["segment_ids"], batch["image_ids"])
    start, stop = np.asarray(mask.start), np.asarray(mask.stop)
    D, heads = c.embed_dim, c.num_heads * c.head_dim
    products = 2 * D * heads + 2 * D * c.num_kv_heads * c.head_dim + 3 * D * c.mlp_dim
    work = 0
    for b, l in np.ndindex(batch["token_types"].shape):
        if batch["token_types"][b, l] == PAD:
            continue
        seen = int(stop[b, l] - start[b, l])
        work += c.num_layers * (2 * products + 4 * seen * heads)
        work += 2 * D * c.vocab_size * (batch["target_weights"][b, l] > 0)
        work += 4 * D * c.layout.patch_dim * (batch["token_types"][b, l] == PATCH)
    assert model_flops(batch, config) == 3 * work


def test_random_rows_have_one_caption_and_one_image():
    batch = next(random_rows(SMALL))
    assert batch["tokens"].shape == (8, 64 + 257) and (batch["token_types"] != PAD).all()
    assert ((batch["token_types"] == PATCH).sum(1) == 256).all()


@pytest.mark.slow
def test_bench_writes_json_and_compares(tmp_path, capsys):
    file, config = tmp_path / "training.json", ROOT / "configs" / "digits.py:tiny"
    for name, seconds, rows in (("other", 3.0, 4), ("elsewhere", 1.0, 5)):
        work = {"name": name, "seconds": seconds, "batch_size": rows, "max_seq_len": 160}
        (tmp_path / f"{name}.json").write_text(json.dumps(work))
    arguments = ["training", f"--config={config}", "--steps=2", "--json", str(file)]
    assert main([*arguments, f"--compare={tmp_path}"]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found) == KEYS and "step_ms" in said
    assert f"{3e3 / found['step_ms']:15.2f}" in next(x for x in said.split("\n") if "other " in x)
    assert "elsewhere" not in said and "skipped 1 file(s) with another workload" in said
    assert found["tokens_per_s"] == pytest.approx(4 * 160 / found["step_ms"] * 1e3, rel=1e-6)
    assert 0 < found["share_of_matmul"] < 1 and 0 <= found["data_wait_share"] < 1
    assert main(["training", f"--config={config}", "--config.steps=no"]) == 2
    assert "steps='no' is not of type int" in capsys.readouterr().err
