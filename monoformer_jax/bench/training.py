"""Times the training step on this machine and compares its FLOP/s with a large matrix product.

    python -m monoformer_jax.bench training                       a small model on random data, float32
    python -m monoformer_jax.bench training --config=configs/digits.py --config.batch_size=24

Without --config: 6.57 M parameters (width 256, 8 layers), batches of 8 rows of 64 text tokens and an
image of 256 patches, DDPM with learned sigma. Model FLOPs count the matrix products of non-padding
tokens, visible attention pairs and predicted tokens, forward and backward; recomputation by remat and
computation on padding take time but are not counted.

--compare=DIR compares with other implementations, one JSON file each, with the seconds of a step:
{"name": "…", "seconds": 1.21, "batch_size": 8, "max_seq_len": 321}
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np

from monoformer_jax.attention import mask_area, row_masks
from monoformer_jax.batch import PAD, PATCH, Batch
from monoformer_jax.bench.matmul import matmul_tflops, native_dtype
from monoformer_jax.bench.others import print_others, read_others
from monoformer_jax.cli import load_config
from monoformer_jax.config import Config
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.packing import Pack
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from monoformer_jax.errors import require
from monoformer_jax.models import get_model, make_config
from monoformer_jax.parallel import check_batch_size, make_mesh, put_batch
from monoformer_jax.planning.estimate import TRAINING
from monoformer_jax.planning.hardware import CHIPS
from monoformer_jax.training.state import init_train_state, make_train_step

SMALL = make_config({
    "name": "bench", "batch_size": 8,
    "model": {
        "vocab_size": 512, "num_layers": 8, "embed_dim": 256, "num_heads": 8, "num_kv_heads": 4,
        "head_dim": 32, "mlp_dim": 704, "channels": 4, "dtype": "float32",
        "remat": "save_names:attention_out,mlp_hidden",
    },
    "objective": {"kind": "ddpm", "learn_sigma": True},
    "data": {"image_size": 32, "max_seq_len": 64 + 257},
    "optimizer": {"b2": 0.999, "weight_decay": 0.0, "clip_norm": 2.0, "ema_decay": 0.9999},
    "sampling": {"solver": "ddpm"},
})  # fmt: skip
# Peak bfloat16 TFLOP/s by `device_kind`.
PEAKS = {
    "TPU v4": CHIPS["v4"].tflops, "TPU v5 lite": CHIPS["v5e"].tflops, "TPU v5": CHIPS["v5p"].tflops,
    "TPU v6 lite": CHIPS["v6e"].tflops, "TPU7x": CHIPS["tpu7x"].tflops,
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989,
}  # fmt: skip
WARM = 2  # untimed warm-up steps


def random_rows(config: Config) -> Iterator[Batch]:
    """Endless batches with one caption and one image per row, packed as in the training pipeline."""
    tokenizer = ByteTokenizer()
    size, text = config.data.image_size, config.data.max_seq_len - config.image_tokens - 4

    def make(number: int):
        rng = np.random.default_rng(number)
        caption = "".join(chr(c) for c in rng.integers(97, 123, text))
        pixels = rng.normal(size=(size, size, config.layout.channels)).astype(np.float32)
        return build_document([caption, Image(pixels, denoise=True)], tokenizer, config.layout)

    documents = grain.MapDataset.range(1 << 20).map(make)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(Pack(
        documents.to_iter_dataset(options), config.layout, rows=config.batch_size,
        length=config.data.max_seq_len, buffer=1, pad_id=tokenizer.pad_id,
        max_images=config.max_images,
    ))  # fmt: skip


def model_flops(batch: Batch, config: Config) -> float:
    """Model FLOPs of a training step on this batch."""
    c = config.model
    tokens, patches = (batch["token_types"] != PAD).sum(), (batch["token_types"] == PATCH).sum()
    pairs = np.asarray(mask_area(row_masks(batch)), np.float64).sum()
    predicted = (batch["target_weights"] > 0).sum()
    counts = {"tokens": tokens, "pairs": pairs, "patches": patches, "text": predicted}
    return TRAINING * float(get_model(c).flops(c, **counts))


def measure(config: Config, batches: Iterator[Batch], steps: int) -> dict:
    """Times `steps` compiled training steps; returns the measurements by their JSON keys."""
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, config.optimizer.grad_accum_steps, mesh)
    state, step = init_train_state(config, mesh), make_train_step(config, mesh)
    for _ in range(WARM):
        batch = put_batch(next(batches), mesh)
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    begin = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    alone = time.perf_counter() - begin  # seconds of a step that does not wait for data

    host, taken, waited = next(batches), [], 0.0
    begin = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, put_batch(host, mesh))
        taken.append(host)
        asked = time.perf_counter()
        host = next(batches)
        waited += max(time.perf_counter() - asked - alone, 0.0)
        jax.block_until_ready(metrics)
    return _numbers(taken, time.perf_counter() - begin, waited, config)


def _numbers(taken: list[Batch], seconds: float, waited: float, config: Config) -> dict:
    """Measurements of steps on the batches `taken`; computed after timing, to not slow a CPU run."""
    devices = jax.devices()
    rate = sum(model_flops(host, config) for host in taken) / seconds / 1e12
    matmul = matmul_tflops(native_dtype(), 20) * (
        1 if devices[0].platform == "cpu" else len(devices)
    )
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    found = {
        "step_ms": 1e3 * seconds / len(taken),
        "tokens_per_s": sum(host["tokens"].size for host in taken) / seconds,
        "images_per_s": sum(int(host["image_ids"].max(-1).sum()) for host in taken) / seconds,
        "model_tflops": rate,
        "matmul_tflops": matmul,
        "share_of_matmul": rate / matmul,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "data_wait_share": waited / seconds,
    }
    if devices[0].device_kind in PEAKS:
        found["mfu"] = rate / (PEAKS[devices[0].device_kind] * len(devices))
    memory = devices[0].memory_stats()
    if memory and "peak_bytes_in_use" in memory:
        found["peak_device_gib"] = memory["peak_bytes_in_use"] / 2**30
    return found


def run(options: argparse.Namespace) -> dict[str, float]:
    """Runs the benchmark and prints its measurements.

    Raises:
      InputError: see `load_config` and `read_others`; or overrides without a config.
    """
    others = read_others(options.compare) if options.compare else []
    if options.config:
        config = load_config(options.config, options.overrides)
        tokenizer = open_tokenizer(config.data, Path(), config.layout.vocab_size)
        batches = Batches(config, tokenizer).iterator
    else:
        require(not options.overrides, f"{''.join(options.overrides[:1])} needs --config=FILE")
        config, batches = SMALL, random_rows(SMALL)
    found = measure(config, batches, options.steps)
    device = jax.devices()[0]
    print(f"{config.name} on {len(jax.devices())} × {device.device_kind}, jax {jax.__version__}")
    for name, value in found.items():
        print(f"  {name:18}{value:14,.4g}")
    if others:
        work = {"batch_size": config.batch_size, "max_seq_len": config.data.max_seq_len}
        print_others("training", work | {"seconds": found["step_ms"] / 1e3}, others)
    return found
