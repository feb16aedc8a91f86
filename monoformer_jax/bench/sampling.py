"""Times image and text generation on this machine, and what the KV cache of the prompt saves.

    python -m monoformer_jax.bench sampling                 8 images, 20 steps, prompts of 64 tokens
    python -m monoformer_jax.bench sampling --sweep         also other batches, steps and prompts
    python -m monoformer_jax.bench sampling --workdir=runs/digits --prompt_tokens=16
    python -m monoformer_jax.bench sampling --compare=DIR   compare with other implementations

Without --workdir the model is randomly initialized: 6.6 M parameters (8 layers of width 256, 8 query
and 4 key/value heads), images of 256 patches. Every image uses classifier-free guidance, so it takes
two sequences of the batch. The Euler, DDPM and DDIM solvers run the model once per step. Compilation
is not timed.

DIR holds a JSON file per implementation and workload:
{"name": "…", "seconds": 18.2, "images": 8, "steps": 20, "prompt_tokens": 64}

Keys of the JSON output:
  seconds              from the prompts to the images
  uncached_seconds     the same, with the prompt recomputed at every step
  prefix_cache_saves   the share of uncached_seconds that the KV cache of the prompt saves
  share_of_matmul      FLOP/s of the decoder, counting only the operations that the images need, divided
                       by those of a large matrix product in the same dtype
  denoising_starts_ms  for a single image: from its prompt to the start of denoising
  first_image_ms       for a single image: from its prompt to the image
  text_tokens_per_s    for a batch of as many sequences as images, 64 new tokens each
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from monoformer_jax.api import Model, load
from monoformer_jax.bench.matmul import matmul_tflops, native_dtype
from monoformer_jax.bench.others import WORK, print_others, read_others
from monoformer_jax.bench.sampling_uncached import generate_images_uncached
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.config import Config, SamplingConfig
from monoformer_jax.data.tokenizer import ByteTokenizer, Tokenizer
from monoformer_jax.errors import require
from monoformer_jax.models import get_model, make_config
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.prompts import encode_prompt, guidance_documents
from monoformer_jax.sampling.state import prefill
from monoformer_jax.sampling.text import GREEDY, decode_tokens, make_sampling_arrays, row_keys

TEXT_TOKENS = 64  # new tokens per sequence
LARGEST_DIFFERENCE = 2e-2  # between cached and uncached images, relative to the largest value


def fresh_model(dtype: str) -> Model:
    """The randomly initialized model that is measured without --workdir."""
    config = make_config({
        "model": {
            "vocab_size": 512, "num_layers": 8, "embed_dim": 256, "num_heads": 8,
            "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 704, "channels": 4, "patch_size": 2,
            "dtype": dtype, "remat": "none",
        },
        "data": {"image_size": 32, "max_seq_len": 8192, "end_of_prompt": False},
    })  # fmt: skip
    params = get_model(config.model).init(config.model, jax.random.key(0))
    processor = ImageProcessor(config.layout, config.data.image_size)
    return Model(config, params, ByteTokenizer(), image_processor=processor)


def words(tokenizer: Tokenizer, tokens: int) -> str:
    """Returns a text of exactly `tokens` tokens.

    Raises:
      InputError: no such text was found.
    """
    text = ""
    while (count := len(tokenizer.encode(text))) < tokens:
        text += " a" if count + 2 <= tokens else "a"
    require(count == tokens, f"found no text of exactly {tokens} tokens for this tokenizer")
    return text


def needed_flops(config: Config, prompt_tokens: int, evaluations: int) -> float:
    """FLOPs of the decoder for one guided image: matrix products and visible attention pairs.

    The prompt, and the <s> and <|im_start|> of the unconditional branch, are counted once.
    """
    c, image, time_tokens = config.model, config.image_tokens, config.layout.time_tokens
    patches = image - time_tokens
    total = 0
    for prefix in (prompt_tokens, 2):
        # Patches attend to the prefix and the complete image, the time token causally.
        seen = patches * (prefix + image) + time_tokens * (prefix + 1)
        pairs = prefix * (prefix + 1) / 2 + evaluations * seen
        tokens = prefix + evaluations * image
        total += get_model(c).flops(c, tokens=tokens, pairs=pairs)
    return total


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def painter(model: Model, text: str, solver: str, generate=generate_images):
    """Returns a function (images, steps) -> the images, as `generate` returns them."""

    def run(images: int, steps: int) -> np.ndarray:
        sampling = SamplingConfig(solver=solver, steps=steps, guidance=2.0)
        return generate(model, [[text]] * images, sampling=sampling)

    return run


def time_painting(model: Model, images: int, steps: int, prompt_tokens: int,
                  options: argparse.Namespace, ceiling: float) -> dict:  # fmt: skip
    """Times one workload; returns its seconds and the rates derived from them."""
    run = painter(model, words(model.tokenizer, prompt_tokens - 2), options.solver)
    run(images, 1)  # compiles for any number of steps, which is a traced array
    seconds = seconds_of(lambda: run(images, steps), options.repeats)
    evaluations = 2 * steps - 1 if options.solver == "heun" else steps
    work = images * needed_flops(model.config, prompt_tokens, evaluations)
    return {
        "images": images,
        "steps": steps,
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
        "images_per_s": images / seconds,
        "share_of_matmul": work / seconds / 1e12 / ceiling,
    }


def time_uncached(model: Model, found: dict, options: argparse.Namespace) -> dict:
    """Times the same workload with the prompt recomputed at every step.

    Raises:
      InputError: the images differ from the cached ones by more than `LARGEST_DIFFERENCE`.
    """
    text = words(model.tokenizer, found["prompt_tokens"] - 2)
    cached = painter(model, text, options.solver)(found["images"], 1)
    run = painter(model, text, options.solver, generate_images_uncached)
    difference = np.abs(run(found["images"], 1) - cached).max() / np.abs(cached).max()
    require(
        float(difference) <= LARGEST_DIFFERENCE,
        f"the uncached images differ from the cached ones by {difference:.1e} of the largest value: "
        "not timed",
    )
    seconds = seconds_of(lambda: run(found["images"], found["steps"]), options.repeats)
    return {"uncached_seconds": seconds, "prefix_cache_saves": 1 - found["seconds"] / seconds}


def time_single(model: Model, found: dict, options: argparse.Namespace) -> dict:
    """Milliseconds for one image, after compiling with another prompt of the same length bucket."""
    c, tokenizer = model.config, model.tokenizer
    text = words(tokenizer, found["prompt_tokens"] - 2)
    other = "b" + text[1:]

    def start(words: str):
        document = encode_prompt(model, [words], reserve=c.image_tokens,
                                 closing=[tokenizer.im_start_id])  # fmt: skip
        return prefill(model, guidance_documents(document, tokenizer, c.layout, 2), least=0).state

    jax.block_until_ready(start(other))
    painter(model, other, options.solver)(1, 1)
    run = painter(model, text, options.solver)
    starts = seconds_of(lambda: start(text), options.repeats)
    complete = seconds_of(lambda: run(1, found["steps"]), options.repeats)
    return {"denoising_starts_ms": 1e3 * starts, "first_image_ms": 1e3 * complete}


def time_text(model: Model, found: dict, options: argparse.Namespace) -> dict:
    """New tokens per second of the decode loop after prefill; stop tokens are disabled."""
    c, tokenizer, rows = model.config, model.tokenizer, found["images"]
    text = words(tokenizer, found["prompt_tokens"] - 1)
    document = encode_prompt(model, [text], reserve=TEXT_TOKENS)
    prefix = prefill(model, [document] * rows)
    arrays = make_sampling_arrays(model, GREEDY, row_keys(0, rows), True)
    arrays = arrays.replace(stops=np.zeros_like(arrays.stops))
    most = np.full(rows, TEXT_TOKENS)

    def run():
        return decode_tokens(model.params, prefix, most, arrays, c.model, TEXT_TOKENS)[1]

    jax.block_until_ready(run())
    return {"text_tokens_per_s": rows * TEXT_TOKENS / seconds_of(run, options.repeats)}


def sweep(model: Model, found: dict, options: argparse.Namespace, ceiling: float) -> list[dict]:
    """Times other batch sizes, steps and prompt lengths, changing one at a time."""
    base = {name: found[name] for name in WORK["sampling"]}
    works = [base | {"images": n} for n in (1, 2 * found["images"])]
    works += [base | {"steps": n} for n in (found["steps"] // 2, 2 * found["steps"]) if n]
    works += [base | {"prompt_tokens": n} for n in (4 * found["prompt_tokens"],)]
    room = model.config.data.max_seq_len - model.config.image_tokens
    works = [work for work in works if work["prompt_tokens"] <= room]
    rows = [time_painting(model, **work, options=options, ceiling=ceiling) for work in works]
    return [{name: found[name] for name in rows[0]}, *rows]


def print_found(found: dict) -> None:
    print(
        f"{found['images']} images, {found['steps']} steps, prompts of {found['prompt_tokens']} "
        f"tokens: {found['seconds']:.2f} s, {found['images_per_s']:.2f} images/s, "
        f"{found['share_of_matmul']:.1%} of a matmul"
    )


def run(options: argparse.Namespace) -> dict:
    """Runs all measurements and prints them.

    Raises:
      InputError: the workdir holds no trained model, or the prompt is too long for it.
    """
    others = read_others(options.compare) if options.compare else []
    dtype = native_dtype()
    model = load(options.workdir) if options.workdir else fresh_model(dtype)
    dtype = model.config.model.dtype
    ceiling = matmul_tflops(dtype, 20)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}: {dtype} matmul {ceiling:.3f} TFLOP/s")
    work = {name: getattr(options, name) for name in WORK["sampling"]}
    found = time_painting(model, **work, options=options, ceiling=ceiling)
    print_found(found)
    found |= time_uncached(model, found, options)
    print(
        f"prompt recomputed at every step: {found['uncached_seconds']:.2f} s; its KV cache saves "
        f"{found['prefix_cache_saves']:.1%}"
    )
    found |= time_single(model, found, options)
    print(
        f"one image: denoising starts after {found['denoising_starts_ms']:.1f} ms, the image is "
        f"complete after {found['first_image_ms']:.0f} ms"
    )
    found |= time_text(model, found, options)
    print(f"text: {found['text_tokens_per_s']:.0f} tokens/s, batch of {found['images']}")
    if others:
        print_others("sampling", found, others)
    found |= {"device": device, "dtype": dtype, "matmul_tflops": ceiling}
    if options.sweep:
        print("sweep")
        found["rows"] = sweep(model, found, options, ceiling)
        for row in found["rows"]:
            print_found(row)
    return found
