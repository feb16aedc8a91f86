"""Samples text and images from a trained model, which chooses the modality by emitting <|im_start|>.

  python -m monoformer_jax.sample --workdir=runs/digits --prompt="two plus three is"
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="draw a seven" --count=8 --out=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="read this: " --image=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompts=prompts.txt --out=pictures/

  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --paint \\
      --prompt="an image of golden retriever"
  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --labels=labels.json \\
      --total=50000 --out=fid

Text is printed, with [picture N] in place of image N. Images are saved to --out: one grid, or with a
name that ends in / a folder with one file per image. A JSON file beside them records seed, settings,
config, checkpoint and every answer. Existing files are replaced only if `sample` wrote them. The
original's weights never emit <|im_start|>: --paint appends it to the prompts.

A prompt is complete: the model answers it, and does not continue its words. --continue_prompt asks for
that. Models without data.end_of_prompt, such as the digits', decide by themselves.

With --total the prompts, evenly repeated, are used to generate shards in the folder --out, which are
merged to samples.npz, arr_0 uint8 [N, height, width, 3]. Their guidance is the config's for scores
(sampling.fid_guidance, if it is set), unless --guidance is given, but not with --benchmark. The same
command resumes an interrupted run.
--benchmark=geneval or dpg draws the prompts of that benchmark, 4 pictures each, in the same way, and
then writes them to a folder of its name in --out, as its own script reads them:

  python -m monoformer_jax.sample --workdir=runs/journeydb --vae=sd-vae-ft-mse --benchmark=geneval \\
      --prompts=geneval/prompts/evaluation_metadata.jsonl --out=geneval

Several processes share the work if all share --out; each uses all its devices. They are connected as in
`train`, automatically or by flags, here two on one machine; process 0 merges the shards at the end:

  python -m monoformer_jax.sample --coordinator=localhost:12345 --processes=2 --process=0 ... &
  python -m monoformer_jax.sample --coordinator=localhost:12345 --processes=2 --process=1 ...

Without --coordinator each --process generates its share independently, and the last merges the shards.

A prompt that cannot be answered is reported, the others are answered, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from monoformer_jax.cli import (
    SEED,
    checkpoint_step,
    finite,
    integer,
    local_path,
    model_path,
    run_command,
    storage_path,
)
from monoformer_jax.errors import InputError, require, shorten

FAILED_ROWS = 1  # exit code
_SHOWN = 80  # characters of a prompt that are printed; the record has all
_BARS = 10  # progress is shown so many times per image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    defaults = "default: the config's sampling"
    add("--workdir", type=model_path, required=True,
        help="workdir of the trained run, a folder or gs://...; or showcase, the model that comes with "
        "the package")  # fmt: skip
    add("--checkpoint", type=checkpoint_step, metavar="N|best",
        help="its step, or best: that with the lowest held-out loss (default: the newest)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the weights; bfloat16 halves their memory")  # fmt: skip
    add("--prompt", action="append", default=[], help="text prompt; may be repeated")
    add(
        "--prompts",
        type=local_path,
        metavar="FILE",
        help="file of prompts, one per line; or .jsonl "
        'with a "prompt" per line, or a folder of .txt',
    )
    add("--negative_prompt", help=f"what guidance leads images away from ({defaults})")
    add("--continue_prompt", action="store_true", help="continue the words of the prompts")
    add("--image", type=local_path,
        help="image appended to every prompt, center-cropped and resized")  # fmt: skip
    add("--count", type=integer(1), help="samples per prompt (default 1; of a benchmark 4)")
    add("--batch", type=integer(1), default=64, help="batch size, images per shard (default 64)")
    add("--out", help="file of the image grid (.png, .jpg, .webp; default samples.png), or FOLDER/ for "
        "a file per image; with --total, a folder; gs://... too")  # fmt: skip
    add("--json", type=_record, metavar="FILE", help="file of the record, also of texts alone "
        "(default: beside the images); - prints it instead of the lines")  # fmt: skip
    add("--npz", type=storage_path, metavar="FILE",
        help="also save the images as arr_0 uint8 [N, height, width, 3]")  # fmt: skip
    add("--total", type=integer(1), help="number of images to generate in the folder --out")
    add("--benchmark", choices=("geneval", "dpg"),
        help="draw a benchmark's --prompts into the folder --out")  # fmt: skip
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    add("--processes", type=integer(1), help="number of processes; 1 disables automatic detection")
    add("--process", type=integer(0), help="index of this process, from 0")
    add("--labels", type=local_path, help="JSON list of the 1000 ImageNet class names; prompts are "
        "class numbers, or with --total all classes if there are no prompts")  # fmt: skip
    add("--chat", action="store_true", help="apply the original's chat template to the prompts")
    add("--paint", action="store_true",
        help="append <|im_start|>: generate an image for every prompt")  # fmt: skip
    add("--vae", type=local_path, help="folder of the autoencoder, for a latent model")
    add("--vision", type=local_path,
        help="folder of the CLIP vision tower, for a model with one")  # fmt: skip
    add("--seed", type=SEED, default=0)
    add("--max_tokens", type=integer(1), default=64, help="maximum tokens of text (default 64)")
    add("--temperature", type=finite, default=0.0,
        help="text sampling temperature; 0 (default) is greedy")  # fmt: skip
    add("--top_k", type=integer(0), default=0,
        help="sample from the k most likely tokens (default 0: all)")  # fmt: skip
    add("--top_p", type=finite, default=1.0, help="nucleus sampling probability (default 1: all)")
    add("--repetition_penalty", type=finite, default=1.0,
        help="above 1 reduces repetition (default 1)")  # fmt: skip
    add("--stop", action="append", default=[], help="stop string; may be repeated")
    add("--steps", type=integer(1, 1000), help=f"solver steps, 1 to 1000 ({defaults})")
    add("--guidance", type=finite, help=f"guidance scale of the prompt, 1 is off ({defaults})")
    add("--image_guidance", type=finite, help=f"guidance scale of --image ({defaults})")
    add("--solver", choices=("euler", "heun", "ddpm", "ddim"),
        help=f"ODE solver or sampler ({defaults})")  # fmt: skip


def _record(text: str):
    return text if text == "-" else storage_path(text)


def main(args: argparse.Namespace) -> int:
    from monoformer_jax.runtime.processes import exit_without_barrier, start_share
    from monoformer_jax.sampling.text import SamplingParams

    text = SamplingParams(args.temperature, args.top_k, args.top_p, args.repetition_penalty,
                          tuple(args.stop))  # fmt: skip
    require(not (args.chat and args.continue_prompt),
            "--chat and --continue_prompt exclude each other: a chat's turns are complete")  # fmt: skip
    if args.benchmark:
        _check_benchmark(args)
    words = _words(args)
    args.count = args.count or 1
    if args.benchmark:
        args.total = args.count * len(words)
    outputs = _outputs(args)
    require(
        args.total is not None or args.process is None or args.coordinator is not None,
        "--process without --coordinator needs --total",
    )
    share = start_share(args.coordinator, args.processes, args.process)
    try:
        return _sample(words, text, outputs, share, args)
    except BaseException as error:
        exit_without_barrier(error)
        raise


def _check_benchmark(args: argparse.Namespace) -> None:
    from monoformer_jax.evaluation.prompts import COUNT, check_benchmark

    args.count = args.count or COUNT
    check_benchmark(args.benchmark, args.prompts, args.count)
    names = ("prompt", "labels", "image", "total")
    unused = [name for name in names if getattr(args, name)]
    require(not unused, f"--{unused and unused[0]} and --benchmark exclude each other")


def _outputs(args: argparse.Namespace) -> Any:
    """The checked outputs of a call: `Outputs`, or the folder of --total."""
    from monoformer_jax.files import expand
    from monoformer_jax.sampling.outputs import SUFFIXES, Outputs

    if args.total is None:
        record = None if args.json == "-" else args.json
        return Outputs.open("samples.png" if args.out is None else args.out, record, args.npz)
    many = "benchmark" if args.benchmark else "total"
    require(
        args.out is not None and not args.out.lower().endswith(SUFFIXES),
        f"--{many} writes a folder of images: give it with --out=FOLDER",
    )
    require(
        args.json is None and args.npz is None and (args.benchmark or args.count == 1),
        f"--{many} writes its own record and arrays, and repeats the prompts: leave out --json, --npz "
        "and --count",
    )
    folder = expand(args.out)
    require(not folder.is_file(), f"--out={folder} is a file, not a folder")
    return folder


def _sample(
    words: list[str], text, outputs, share: tuple[int, int], args: argparse.Namespace
) -> int:
    import monoformer_jax
    from monoformer_jax.data.templates import chat_parts, complete_prompt
    from monoformer_jax.parallel import describe_mesh
    from monoformer_jax.runtime.processes import run_on_first
    from monoformer_jax.sampling.image import fid_sampling

    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision, dtype=args.dtype,
                                checkpoint=args.checkpoint)  # fmt: skip
    if model.mesh is not None:
        print(f"mesh of {model.mesh.size} devices: {describe_mesh(model.mesh)}", file=sys.stderr)
    names = ("steps", "guidance", "image_guidance", "negative_prompt", "solver")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = model.config.sampling
    if args.total is not None and not args.benchmark:
        sampling = fid_sampling(sampling)
    sampling = dataclasses.replace(sampling, **flags)
    model.config = dataclasses.replace(model.config, sampling=sampling)
    if args.paint or args.total is not None:
        model.image_processor.codec.check()
    shown = [model.image_processor.encode(args.image, "--image")] if args.image else []
    if args.chat:
        prompts = [
            (word, chat_parts([{"role": "user", "content": [word, *shown]}])) for word in words
        ]
    else:
        ends = model.config.data.end_of_prompt and not args.continue_prompt
        prompts = [(word, complete_prompt([word, *shown], ends)) for word in words]
    if args.total is not None:
        return _many(model, prompts, outputs, share, args)
    prompts = [prompt for prompt in prompts for _ in range(args.count)]
    return run_on_first(lambda: _answers(model, prompts, text, outputs, args))


def _words(args: argparse.Namespace) -> list[str]:
    """Returns the texts of the prompts."""
    from monoformer_jax.data.templates import class_prompts, read_labels
    from monoformer_jax.evaluation.prompts import read_prompts

    words = list(args.prompt)
    if args.prompts is not None:
        words += [prompt.text for prompt in read_prompts(args.prompts)]
    if args.labels is not None:
        names = read_labels(args.labels)
        words = words or [str(i) for i in range(len(names) if args.total else 0)]
        for word in words:
            require(
                word.isdecimal() and len(word) < 10 and int(word) < len(names),
                f"prompt {shorten(word, _SHOWN)!r}: with --labels it must be a class number, 0 to 999",
            )
        words = [class_prompts(names[int(word)])[0] for word in words]
    require(bool(words), "there is no prompt: give --prompt or --prompts")
    return words


def _answers(
    model, prompts: list[tuple[str, list]], text, outputs, args: argparse.Namespace
) -> int:
    """Answers the prompts in batches; reports prompts that cannot be answered."""
    from tqdm import tqdm

    from monoformer_jax.sampling.prompts import encode_prompt

    reserve = model.config.image_tokens + 1 if args.paint else 1
    closing = [model.tokenizer.im_start_id] if args.paint else []
    good, rows, pictures = [], [], []
    for number, (word, parts) in enumerate(prompts):
        try:
            encode_prompt(model, parts, reserve=reserve, closing=closing)
            good.append(number)
        except InputError as error:
            print(f"prompt {number + 1}, {shorten(word, _SHOWN)!r}: {error}", file=sys.stderr)
    with tqdm(total=len(good), desc="sampling", unit="prompt", disable=None) as bar:
        for start in range(0, len(good), args.batch):
            numbers = good[start : start + args.batch]
            batch = [prompts[number][1] for number in numbers]
            for number, reply in zip(numbers, _replies(model, batch, start, text, args, bar)):
                answer: list = []
                for part in reply:
                    if not isinstance(part, str):
                        pictures.append(model.image_processor.decode(part[None])[0])
                        part = {"picture": len(pictures)}
                    answer.append(part)
                word = prompts[number][0]
                rows.append({"prompt": word, "answer": answer})
                if args.json != "-":
                    bar.write(_line(word, answer))
            bar.update(len(numbers))
    facts = _facts(model, args) | {"rows": rows}
    if pictures:
        outputs.write(pictures, min(args.count, len(pictures)))
    if args.json == "-":
        print(json.dumps(facts, indent=2))
    elif pictures or args.json is not None:
        outputs.write_record(facts)
    if pictures and args.json != "-":
        print(f"{len(pictures)} picture(s) in {outputs.pictures}, how they were made in "
              f"{outputs.record}")  # fmt: skip
    return 0 if len(good) == len(prompts) else FAILED_ROWS


def _replies(model, batch: list, first: int, text, args: argparse.Namespace, bar) -> list[list]:
    """The texts and images that answer a batch of prompts; shows the steps of an image on `bar`."""
    from monoformer_jax.sampling.session import Session

    steps = model.config.sampling.steps
    every = 0 if bar.disable else max(1, steps // _BARS)

    def show(step: int, _) -> None:
        bar.set_postfix_str(f"step {step}/{steps}")

    session = Session(
        model, len(batch), seed=args.seed, first=first, text=text,
        reencode=model.image_processor.reencode,
    )  # fmt: skip
    session.append(batch)
    if not args.paint:
        return session.generate(args.max_tokens, preview=show if every else None, every=every)
    rows = range(len(batch))
    session.begin_image(rows)
    images = session.generate_images(rows, preview=show if every else None, every=every)
    return [[image] for image in images]


def _line(prompt: str, answer: list) -> str:
    words = [part if isinstance(part, str) else f"[picture {part['picture']}]" for part in answer]
    return f"{shorten(prompt, _SHOWN)!r} -> {' '.join(words)!r}"


def _facts(model, args: argparse.Namespace) -> dict:
    return {
        "workdir": str(args.workdir.resolve()),
        "step": model.step,
        "seed": args.seed,
        "config": model.config.to_dict(),
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
    }


def _many(
    model, prompts: list[tuple[str, list]], folder, share: tuple[int, int], args: argparse.Namespace
) -> int:
    import jax
    import numpy as np

    from monoformer_jax.evaluation.prompts import facts_of, read_prompts, write_benchmark
    from monoformer_jax.sampling.image import generate_images
    from monoformer_jax.sampling.outputs import to_rgb
    from monoformer_jax.sampling.prompts import encode_prompt
    from monoformer_jax.sampling.shards import generate_shards

    for number, (_, parts) in enumerate(prompts, 1):  # check all prompts before the first image
        encode_prompt(model, parts, reserve=model.config.image_tokens,
                      closing=[model.tokenizer.im_start_id], name=f"prompt {number}")  # fmt: skip

    each = args.count

    def generate(first: int, images: int) -> np.ndarray:
        numbers = range(first, first + images)
        parts = [prompts[number // each % len(prompts)][1] for number in numbers]
        generated = generate_images(model, parts, seed=args.seed, first=first)
        return to_rgb(model.image_processor.decode(generated))

    image = args.image.read_bytes() if args.image else b""
    facts = _facts(model, args) | {"continue_prompt": args.continue_prompt}
    facts |= facts_of([word for word, _ in prompts], image, each)
    is_first = jax.process_index() == 0
    index, count = share
    samples = generate_shards(
        folder, args.total, args.batch, facts, generate, process=index, processes=count,
        log=print if is_first else lambda line: None,
    )  # fmt: skip
    if is_first and samples and args.benchmark:
        print(
            f"writing {write_benchmark(args.benchmark, samples, read_prompts(args.prompts), each)}"
        )
    if is_first:
        print(f"{args.total} images in {samples}" if samples else
              f"this share is done; {folder / 'samples.npz'} follows after the last one")  # fmt: skip
    return 0


if __name__ == "__main__":
    run_command("sample", __doc__, add_arguments, main)
