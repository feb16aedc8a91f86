"""Samples text and images from a trained model, which chooses the modality by emitting <|im_start|>.

  python -m monoformer_jax.sample --workdir=runs/digits --prompt="two plus three is"
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="draw a seven" --count=8 --out=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="read this: " --image=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompts=prompts.txt

  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --paint \\
      --prompt="an image of golden retriever"
  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --labels=labels.json \\
      --total=50000 --out=fid

Text is printed, with [picture N] in place of image N. Images are saved to --out as one grid, with a
JSON file beside it: seed, settings, config, checkpoint and every answer. The original's weights never
emit <|im_start|>: --paint appends it to the prompts.

With --total the prompts, evenly repeated, are used to generate shards in the folder --out, which are
merged to samples.npz, arr_0 uint8 [N, height, width, 3]. Their guidance is the config's for scores
(sampling.fid_guidance, if it is set), unless --guidance is given. The same command resumes an
interrupted run.
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
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from monoformer_jax.cli import run_command

FAILED_ROWS = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    defaults = "default: the config's sampling"
    add(
        "--workdir",
        type=epath.Path,
        required=True,
        help="workdir of the trained run, a folder or gs://...",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the weights; bfloat16 halves their memory")  # fmt: skip
    add("--prompt", action="append", default=[], help="text prompt; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="file of prompts, one per line")
    add("--image", type=Path, help="image appended to every prompt, center-cropped and resized")
    add("--count", type=int, default=1, help="samples per prompt (default 1)")
    add("--batch", type=int, default=64, help="batch size, and images per shard (default 64)")
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="image grid to write; with --total, a folder",
    )
    add("--npz", type=Path, help="also save the images as arr_0 uint8 [N, height, width, 3]")
    add("--total", type=int, help="number of images to generate in the folder --out")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    add("--processes", type=int, help="number of processes; 1 disables automatic detection")
    add("--process", type=int, help="index of this process, from 0")
    add("--labels", type=Path, help="JSON list of the 1000 ImageNet class names; prompts are "
        "class numbers, or with --total all classes if there are no prompts")  # fmt: skip
    add("--chat", action="store_true", help="apply the original's chat template to the prompts")
    add(
        "--paint",
        action="store_true",
        help="append <|im_start|>: generate an image for every prompt",
    )
    add("--vae", type=Path, help="folder of the autoencoder, for a latent model")
    add("--vision", type=Path, help="folder of the CLIP vision tower, for a model with one")
    add("--seed", type=int, default=0)
    add("--max_tokens", type=int, default=64, help="maximum tokens of text (default 64)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="text sampling temperature; 0 (default) is greedy",
    )
    add(
        "--top_k", type=int, default=0, help="sample from the k most likely tokens (default 0: all)"
    )
    add("--top_p", type=float, default=1.0, help="nucleus sampling probability (default 1: all)")
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1 reduces repetition (default 1)",
    )
    add("--stop", action="append", default=[], help="stop string; may be repeated")
    add("--steps", type=int, help=f"solver steps, 1 to 1000 ({defaults})")
    add("--guidance", type=float, help=f"guidance scale of the prompt, 1 is off ({defaults})")
    add("--image_guidance", type=float, help=f"guidance scale of --image ({defaults})")
    add(
        "--solver",
        choices=("euler", "heun", "ddpm", "ddim"),
        help=f"ODE solver or sampler ({defaults})",
    )


def main(args: argparse.Namespace) -> int:
    from monoformer_jax.errors import require
    from monoformer_jax.runtime.processes import exit_without_barrier, start_share
    from monoformer_jax.sampling.text import SamplingParams

    for name in ("count", "max_tokens", "batch"):
        require(getattr(args, name) > 0, f"--{name}={getattr(args, name)} must be above 0")
    text = SamplingParams(args.temperature, args.top_k, args.top_p, args.repetition_penalty,
                          tuple(args.stop))  # fmt: skip
    words = _words(args)
    require(
        args.total is not None or args.process is None or args.coordinator is not None,
        "--process without --coordinator needs --total",
    )
    share = start_share(args.coordinator, args.processes, args.process)
    try:
        return _sample(words, text, share, args)
    except BaseException as error:
        exit_without_barrier(error)
        raise


def _sample(words: list[str], text, share: tuple[int, int], args: argparse.Namespace) -> int:
    import monoformer_jax
    from monoformer_jax.data.templates import chat_parts, complete_prompt
    from monoformer_jax.parallel import describe_mesh
    from monoformer_jax.runtime.processes import run_on_first
    from monoformer_jax.sampling.image import fid_sampling

    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision, dtype=args.dtype)
    if model.mesh is not None:
        print(f"mesh of {model.mesh.size} devices: {describe_mesh(model.mesh)}", file=sys.stderr)
    names = ("steps", "guidance", "image_guidance", "solver")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = model.config.sampling
    sampling = dataclasses.replace(fid_sampling(sampling) if args.total else sampling, **flags)
    model.config = dataclasses.replace(model.config, sampling=sampling)
    if args.paint or args.total:
        model.image_processor.codec.check()
    shown = [model.image_processor.encode(args.image, "--image")] if args.image else []
    if args.chat:
        prompts = [
            (word, chat_parts([{"role": "user", "content": [word, *shown]}])) for word in words
        ]
    else:
        ends = model.config.data.end_of_prompt
        prompts = [(word, complete_prompt([word, *shown], ends)) for word in words]
    if args.total is not None:
        return _many(model, prompts, share, args)
    prompts = [prompt for prompt in prompts for _ in range(args.count)]
    return run_on_first(lambda: _answers(model, prompts, text, args))


def _words(args: argparse.Namespace) -> list[str]:
    """Returns the texts of the prompts."""
    from monoformer_jax.data.templates import class_prompts, read_labels
    from monoformer_jax.errors import require

    words = list(args.prompt)
    if args.prompts is not None:
        require(args.prompts.is_file(), f"--prompts={args.prompts}: no such file")
        try:
            words += args.prompts.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            require(False, f"--prompts={args.prompts} is not UTF-8 text")
    if args.labels is not None:
        names = read_labels(args.labels)
        words = words or [str(i) for i in range(len(names) if args.total else 0)]
        for word in words:
            require(
                word.isdecimal() and int(word) < len(names),
                f"prompt {word!r}: with --labels it must be a class number, 0 to 999",
            )
        words = [class_prompts(names[int(word)])[0] for word in words]
    require(bool(words), "there is no prompt: give --prompt or --prompts")
    return words


def _answers(model, prompts: list[tuple[str, list]], text, args: argparse.Namespace) -> int:
    """Answers the prompts in batches; reports prompts that cannot be answered."""
    from monoformer_jax.errors import InputError
    from monoformer_jax.sampling.prompts import encode_prompt
    from monoformer_jax.sampling.session import Session

    reserve = model.config.image_tokens + 1 if args.paint else 1
    closing = [model.tokenizer.im_start_id] if args.paint else []
    good, answers = [], {}
    for number, (word, parts) in enumerate(prompts):
        try:
            encode_prompt(model, parts, reserve=reserve, closing=closing)
            good.append(number)
        except InputError as error:
            print(f"prompt {number + 1}, {word!r}: {error}", file=sys.stderr)
    pictures = []
    for start in range(0, len(good), args.batch):
        numbers = good[start : start + args.batch]
        session = Session(
            model, len(numbers), seed=args.seed, first=start, text=text,
            reencode=model.image_processor.reencode,
        )  # fmt: skip
        session.append([prompts[number][1] for number in numbers])
        if args.paint:
            session.begin_image(range(len(numbers)))
            replies = [[image] for image in session.generate_images(range(len(numbers)))]
        else:
            replies = session.generate(args.max_tokens)
        for number, reply in zip(numbers, replies):
            answers[number] = []
            for part in reply:
                if not isinstance(part, str):
                    pictures.append(model.image_processor.decode(part[None])[0])
                    part = {"picture": len(pictures)}
                answers[number].append(part)
            words = [
                p if isinstance(p, str) else f"[picture {p['picture']}]" for p in answers[number]
            ]
            print(f"{prompts[number][0]!r} -> {' '.join(words)!r}")
    _write(model, prompts, answers, pictures, args)
    return 0 if len(good) == len(prompts) else FAILED_ROWS


def _write(model, prompts, answers: dict, pictures: Sequence, args: argparse.Namespace) -> None:
    import numpy as np

    from monoformer_jax.data.image_io import image_grid

    if pictures:
        image_grid(pictures, columns=min(args.count, len(pictures))).save(args.out)
        rows = [{"prompt": prompts[number][0], "answer": answers[number]} for number in answers]
        sidecar = args.out.with_suffix(".json")
        facts = _facts(model, args) | {"rows": rows}
        sidecar.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(f"{len(pictures)} picture(s) in {args.out}, how they were made in {sidecar}")
    if args.npz is not None and pictures:
        with args.npz.open("wb") as file:
            np.savez(file, _rgb(np.stack(pictures)))


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
    model, prompts: list[tuple[str, list]], share: tuple[int, int], args: argparse.Namespace
) -> int:
    import jax
    import numpy as np

    from monoformer_jax.sampling.image import generate_images
    from monoformer_jax.sampling.prompts import encode_prompt
    from monoformer_jax.sampling.shards import generate_shards

    for number, (_, parts) in enumerate(prompts, 1):  # check all prompts before the first image
        encode_prompt(model, parts, reserve=model.config.image_tokens,
                      closing=[model.tokenizer.im_start_id], name=f"prompt {number}")  # fmt: skip

    def generate(first: int, images: int) -> np.ndarray:
        parts = [prompts[i % len(prompts)][1] for i in range(first, first + images)]
        generated = generate_images(model, parts, seed=args.seed, first=first)
        return _rgb(model.image_processor.decode(generated))

    asked = "\n".join(word for word, _ in prompts)
    image = args.image.read_bytes() if args.image else b""
    facts = _facts(model, args) | {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(asked.encode() + b"\0" + image).hexdigest(),
    }
    is_first = jax.process_index() == 0
    index, count = share
    samples = generate_shards(
        args.out, args.total, args.batch, facts, generate, process=index, processes=count,
        log=print if is_first else lambda line: None,
    )  # fmt: skip
    if is_first:
        print(f"{args.total} images in {samples}" if samples else
              f"this share is done; {args.out / 'samples.npz'} follows after the last one")  # fmt: skip
    return 0


def _rgb(images):
    import numpy as np

    from monoformer_jax.data.image_io import to_uint8

    pixels = to_uint8(images)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


if __name__ == "__main__":
    run_command("sample", __doc__, add_arguments, main)
