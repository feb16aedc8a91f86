"""Times the input pipeline by stage: records to packed batches, and the decoding of JPEG files.

    python -m monoformer_jax.bench input_pipeline                   records made for the purpose
    python -m monoformer_jax.bench input_pipeline --config=configs/imagenet256.py \\
        --config.data.records.imagenet=records/imagenet             the data of a config

Without --config: an ImageNet-like run, 256 rows of 512 tokens a step, with captions and random moments
of 32×32×4. `documents_per_s` and its neighbours are of batches of --host_rows rows that --workers
processes make; the figures "per core" divide by the processor time that one process took for the same,
so they hold beside other programs too. JPEG files of 256×256 are decoded as `prepare_data` does,
beside Pillow alone on as many processes, in turn, since other programs may use the machine.
`bytes_per_document_slope` is the growth of the peak memory of a process that makes batches, over the
second half of --documents.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from monoformer_jax.batch import PAD
from monoformer_jax.cli import load_config
from monoformer_jax.config import Config
from monoformer_jax.data.decoding import decode_example, decode_examples
from monoformer_jax.data.documents import Image, Prompt
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.pipeline import Batches, RowIterator, cores, open_stages
from monoformer_jax.data.raw import RawExample, RawImage
from monoformer_jax.data.records import write_records
from monoformer_jax.data.sources import Source
from monoformer_jax.data.tokenizer import open_tokenizer
from monoformer_jax.errors import require
from monoformer_jax.models import base_config, make_config

RECORDS = 2048
JPEGS = 512
ROUNDS = 3  # of the comparison with Pillow


def example_config(folder: Path) -> Config:
    """An ImageNet-like run on records in `folder`, which this function writes."""
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(16, 2, 32, 32, 4)).astype(np.float32)
    examples = (
        [
            Prompt((f"Please generate an image of a cat number {i}.", f"cat {i}")),
            Image(moments[i % 16, 0], True, moments[i % 16, 1]),
        ]
        for i in range(RECORDS)
    )
    write_records(folder, examples)
    values = base_config().to_dict()
    values |= {"name": "bench", "batch_size": 256}
    values["model"] |= {"channels": 4, "vocab_size": 512}
    values["data"] |= {
        "records": {"moments": str(folder)}, "mixture": {"moments": 1.0}, "image_size": 32,
        "max_seq_len": 512, "sample_latents": True,
    }  # fmt: skip
    return make_config(values)


def rate(items: Iterator, seconds: float, call: Callable) -> float:
    """Calls per second of processor time, with the items of an endless iterator."""
    call(next(items))
    begin, passed, count = time.process_time(), 0.0, 0
    while passed < seconds:
        call(next(items))
        count, passed = count + 1, time.process_time() - begin
    return count / passed


def stages(source: Source, to_document: Callable, seconds: float) -> dict[str, float]:
    """Documents per core and second of each stage before packing."""
    rng, count = np.random.default_rng(0), min(len(source.examples), 256)
    examples = [source.examples[i] for i in range(count)]
    read, build = source.examples.__getitem__, partial(to_document, rng=rng)
    return {
        "read_per_core_s": rate(itertools.cycle(range(count)), seconds, read),
        "build_per_core_s": rate(itertools.cycle(examples), seconds, build),
    }


def batches(iterator: RowIterator, seconds: float) -> dict[str, float]:
    """What comes out per second, and the time of a batch; closes the iterator."""
    with contextlib.closing(iterator):
        next(iterator)
        counts, times = np.zeros(4), []
        begin, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            asked = time.perf_counter()
            counts += count(next(iterator))
            times.append(time.perf_counter() - asked)
        busy = time.process_time() - busy
    documents, images, real, tokens = counts / sum(times)
    return {
        "documents_per_s": documents,
        "tokens_per_s": real,
        "images_per_s": images,
        "real_token_share": real / tokens,
        "batch_ms": 1e3 * float(np.mean(times)),
        "slowest_batch_ms": 1e3 * max(times),
        "documents_per_core_s": counts[0] / busy,  # of this process alone
        "batch_core_ms": 1e3 * busy / len(times),
    }


def count(batch) -> np.ndarray:
    """Documents, images, tokens without padding, and tokens of a batch."""
    real = (batch["token_types"] != PAD).sum()
    ends = (batch[name].max(-1).sum() for name in ("segment_ids", "image_ids"))
    return np.array([*ends, real, batch["tokens"].size])


def memory_slope(iterator: RowIterator, documents: int) -> float:
    """Growth of the peak memory in bytes per document, over the second half of the documents."""
    made, half = 0, None
    while made < documents or half is None:
        made += count(next(iterator))[0]
        if half is None and made >= documents / 2:
            half = made, peak_bytes()
    return (peak_bytes() - half[1]) / max(made - half[0], 1)


def peak_bytes() -> int:
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_jpegs(folder: Path) -> list[Path]:
    """Pictures of 256×256 with about the detail, and so the file size, of photographs."""
    rng, files = np.random.default_rng(0), []
    for number in range(JPEGS):
        small = rng.integers(0, 256, (48, 48, 3), np.uint8)
        picture = PIL.Image.fromarray(small).resize((256, 256), PIL.Image.BICUBIC)
        draw = PIL.ImageDraw.Draw(picture)
        for x, y in rng.integers(0, 200, (8, 2)).tolist():
            draw.ellipse((x, y, x + 50, y + 30), tuple(rng.integers(0, 256, 3).tolist()))
        files.append(folder / f"{number}.jpg")
        picture.save(files[-1], quality=90)
    return files


def pillow(file: Path) -> int:
    with PIL.Image.open(file) as image:
        return np.asarray(image.convert("RGB")).size


def raw_example(file: Path) -> RawExample:
    return RawExample(str(file), [RawImage(partial(open_image, file), denoise=True)])


def jpegs(folder: Path, workers: int) -> dict[str, float]:
    """Images per second of `decode_examples` and of Pillow alone; the median of `ROUNDS` in turn."""
    files = write_jpegs(folder) * (4 * workers)
    examples = [partial(raw_example, file) for file in files]
    spawn = multiprocessing.get_context("spawn")
    ours, alone = [], []
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        list(pool.map(pillow, files[: 16 * workers]))  # starts the processes
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            list(pool.map(pillow, files, chunksize=32))
            alone.append(len(files) / (time.perf_counter() - begin))
            # Timed between the start of the processes and their end: with as much done ahead at both.
            spare = JPEGS // 2 * workers
            counted = len(files) - 2 * spare
            with contextlib.closing(decode_examples(examples, 256, workers)) as decoded:
                for _ in itertools.islice(decoded, spare):
                    pass
                begin = time.perf_counter()
                for _ in itertools.islice(decoded, counted):
                    pass
                ours.append(counted / (time.perf_counter() - begin))
    decode = partial(decode_example, size=256)
    return {
        "jpeg_per_core_s": rate(itertools.cycle(examples), 2, decode),
        "pillow_per_core_s": rate(itertools.cycle(files), 2, pillow),
        "jpeg_images_per_s": float(np.median(ours)),
        "pillow_images_per_s": float(np.median(alone)),
        "jpeg_share_of_pillow": float(np.median(np.divide(ours, alone))),
    }


def run(options: argparse.Namespace) -> dict[str, float]:
    """Runs the benchmark and prints its measurements.

    Raises:
      InputError: see `load_config`; overrides without a config, or more rows than the batch has.
    """
    require(
        options.config or not options.overrides,
        f"{''.join(options.overrides[:1])} needs --config=FILE",
    )
    require(options.seconds > 0, f"--seconds={options.seconds} must be above 0")
    options.workers = cores() if options.workers is None else options.workers
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(Path(folder), options, options.overrides)
    for name, value in found.items():
        print(f"  {name:26}{value:14,.4g}")
    return found


def _measure(folder: Path, options, overrides: list[str]) -> dict[str, float]:
    config = load_config(options.config, overrides) if options.config else example_config(folder)
    tokenizer = open_tokenizer(config.data, Path(), config.layout.vocab_size)
    rows = options.host_rows
    require(
        rows <= config.batch_size, f"--host_rows={rows} is above batch_size={config.batch_size}"
    )
    print(
        f"{config.name}: {rows} of {config.batch_size} rows of {config.data.max_seq_len} tokens, "
        f"{config.streams} streams, {options.workers} workers, {cores()} cores",
        flush=True,
    )

    def make(rows: int, workers: int = 0) -> RowIterator:
        return Batches(config, tokenizer, range(rows), workers).iterator

    found = batches(make(rows, options.workers), options.seconds)
    alone = batches(make(rows), options.seconds)
    found |= {name: alone[name] for name in ("documents_per_core_s", "batch_core_ms")}
    found |= stages(*open_stages(config, tokenizer), options.seconds)
    found["bytes_per_document_slope"] = memory_slope(
        make(config.batch_size // config.streams), options.documents
    )
    return found | jpegs(folder, max(options.workers, 1))
