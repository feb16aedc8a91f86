"""Continues prompts with a trained model, which decides itself whether to write or to paint.

  python -m monoformer_jax.sample --workdir=runs/digits --prompt="two plus three is"
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="draw a seven" --count=8 --out=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="read this: " --image=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompts=prompts.txt

  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --paint \\
      --prompt="an image of golden retriever"
  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --labels=labels.json \\
      --total=50000 --out=fid

Text is printed, with a number where a picture stands in it. The pictures go to --out as one grid, and
beside it to a JSON file: seed, settings, config, checkpoint and every answer. The original's weights
never decide to paint: --paint does it for them.

With --total the prompts, evenly repeated, are painted into shards in the folder --out, and joined as
samples.npz, arr_0 uint8 [N, height, width, 3]. The same command again goes on where it was stopped.
Several processes share the work if all see --out; all devices of each paint. They find each other, or
are told, as in `train`, here two on one machine; the first joins the shards when all are done:

  python -m monoformer_jax.sample --coordinator=localhost:12345 --processes=2 --process=0 ... &
  python -m monoformer_jax.sample --coordinator=localhost:12345 --processes=2 --process=1 ...

Without --coordinator each --process paints its share whenever it runs, and the last joins the shards.

A prompt that cannot be answered is reported, the others are, and the exit code is 1.
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
        "--workdir", type=epath.Path, required=True, help="of the trained run, a folder or gs://..."
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights; bfloat16 halves their memory")  # fmt: skip
    add("--prompt", action="append", default=[], help="may be given many times")
    add("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    add("--image", type=Path, help="a picture put after every prompt, its centre resized")
    add("--count", type=int, default=1, help="samples of each prompt (default 1)")
    add("--batch", type=int, default=64, help="rows at a time, images in a shard (default 64)")
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="grid of pictures; folder with --total",
    )
    add("--npz", type=Path, help="the pictures as arr_0 uint8 [N, height, width, 3] too")
    add("--total", type=int, help="paint so many images into the folder --out")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, at a free port")
    add("--processes", type=int, help="how many; 1 keeps to itself on any machine")
    add("--process", type=int, help="which of them this is, from 0")
    add("--labels", type=Path, help="JSON list of ImageNet's 1000 names; the prompts are its "
        "numbers, or with --total all of them if there are no prompts")  # fmt: skip
    add("--chat", action="store_true", help="put the prompts into the original's chat template")
    add("--paint", action="store_true", help="paint right after the prompts")
    add("--vae", type=Path, help="folder of the autoencoder, for a model of latents")
    add("--vision", type=Path, help="folder of the CLIP tower, for a model that looks through one")
    add("--seed", type=int, default=0)
    add("--max_tokens", type=int, default=64, help="longest text (default 64)")
    add("--temperature", type=float, default=0.0, help="of the text; 0 (default) is greedy")
    add("--top_k", type=int, default=0, help="only the k likeliest tokens (default 0: all)")
    add(
        "--top_p", type=float, default=1.0, help="only the likeliest of this share (default 1: all)"
    )
    add("--repetition_penalty", type=float, default=1.0, help="above 1 repeats less (default 1)")
    add(
        "--stop", action="append", default=[], help="text ends before this; may be given many times"
    )
    add("--steps", type=int, help=f"solver steps, 1 to 1000 ({defaults})")
    add("--guidance", type=float, help=f"by the prompt, 1 is none ({defaults})")
    add("--image_guidance", type=float, help=f"by the picture of --image ({defaults})")
    add("--solver", choices=("euler", "heun", "ddpm", "ddim"), help=defaults)


def main(args: argparse.Namespace) -> int:
    from monoformer_jax.errors import require
    from monoformer_jax.runtime.processes import exit_without_barrier
    from monoformer_jax.sampling.text import SamplingParams

    for name in ("count", "max_tokens", "batch"):
        require(getattr(args, name) > 0, f"--{name}={getattr(args, name)} must be above 0")
    text = SamplingParams(args.temperature, args.top_k, args.top_p, args.repetition_penalty,
                        tuple(args.stop))  # fmt: skip
    words = _words(args)
    share = _start_processes(args)
    try:
        return _sample(words, text, share, args)
    except BaseException as error:
        exit_without_barrier(error)
        raise


def _start_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many: those of jax, or the numbers that were given alone."""
    import jax

    from monoformer_jax.errors import require
    from monoformer_jax.runtime.processes import start_processes

    index, count = args.process, args.processes
    if args.coordinator is not None or index is None:
        start_processes(args.coordinator, count, index)
        return jax.process_index(), jax.process_count()
    require(count is not None, "--processes and --process go together")
    require(args.total is not None, "--process without --coordinator is a share of --total")
    require(0 <= index < count, f"--process={index} is not between 0 and --processes={count} - 1")
    return index, count


def _sample(words: list[str], text, share: tuple[int, int], args: argparse.Namespace) -> int:
    import monoformer_jax
    from monoformer_jax.runtime.processes import run_on_first

    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision, dtype=args.dtype)
    flags = {
        name: getattr(args, name) for name in ("steps", "guidance", "image_guidance", "solver")
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    sampling = dataclasses.replace(model.config.sampling, **flags)
    model.config = dataclasses.replace(model.config, sampling=sampling)
    if args.paint or args.total:
        model.image_processor.check_decodable()
    shown = [model.image_processor.encode(args.image, "--image")] if args.image else []
    prompts = [[prompt, *shown] for prompt in words]
    if args.total is not None:
        return _many(model, prompts, share, args)
    prompts = [prompt for prompt in prompts for _ in range(args.count)]
    return run_on_first(lambda: _answers(model, prompts, text, args))


def _words(args: argparse.Namespace) -> list[str]:
    """The prompts as the model was trained to be asked."""
    from monoformer_jax.data import templates as said
    from monoformer_jax.errors import require

    words = list(args.prompt)
    if args.prompts is not None:
        require(args.prompts.is_file(), f"--prompts={args.prompts}: there is no such file")
        try:
            words += args.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            require(False, f"--prompts={args.prompts} is no UTF-8 text")
    if args.labels is not None:
        names = said.read_labels(args.labels)
        words = words or [str(i) for i in range(len(names) if args.total else 0)]
        for word in words:
            require(
                word.isdecimal() and int(word) < len(names),
                f"prompt {word!r}: with --labels it is the number of a class, 0 to 999",
            )
        words = [said.class_prompts(names[int(word)])[0] for word in words]
    require(bool(words), "there is no prompt: give --prompt or --prompts")
    return [said.chat(word) for word in words] if args.chat else words


def _answers(model, prompts: list[list], text, args: argparse.Namespace) -> int:
    """Answers every prompt, a batch at a time; a prompt that cannot be is reported at its place."""
    from monoformer_jax.errors import InputError
    from monoformer_jax.sampling.prompts import encode_prompt
    from monoformer_jax.sampling.session import Session

    room = model.config.image_tokens + 1 if args.paint else 1
    good, answers = [], {}
    for number, parts in enumerate(prompts):
        try:
            closing = [model.tokenizer.im_start_id] if args.paint else []
            encode_prompt(parts, model.tokenizer, model.config, room=room, closing=closing)
            good.append(number)
        except InputError as error:
            print(f"prompt {number + 1}, {parts[0]!r}: {error}", file=sys.stderr)
    pictures = []
    for start in range(0, len(good), args.batch):
        numbers = good[start : start + args.batch]
        session = Session(
            model.config, model.params, model.tokenizer, len(numbers), seed=args.seed, first=start,
            text=text, look=model.image_processor.reencode,
        )  # fmt: skip
        session.append([prompts[number] for number in numbers])
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


def _many(model, prompts: list[list], share: tuple[int, int], args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from monoformer_jax.config import MeshConfig
    from monoformer_jax.parallel import make_mesh
    from monoformer_jax.sampling.image import generate_images
    from monoformer_jax.sampling.prompts import encode_prompt
    from monoformer_jax.sampling.shards import generate_shards

    for number, parts in enumerate(prompts, 1):  # all of them before the first is painted
        encode_prompt(parts, model.tokenizer, model.config, room=model.config.image_tokens,
               closing=[model.tokenizer.im_start_id], name=f"prompt {number}")  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(model.params, everywhere)

    def generate(first: int, images: int) -> np.ndarray:
        parts = [prompts[i % len(prompts)] for i in range(first, first + images)]
        painted = generate_images(
            model.config, params, model.tokenizer, parts, seed=args.seed, first=first, mesh=mesh
        )
        return _rgb(model.image_processor.decode(painted))

    asked = "\n".join(parts[0] for parts in prompts)
    image = args.image.read_bytes() if args.image else b""
    facts = _facts(model, args) | {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(asked.encode() + b"\0" + image).hexdigest(),
    }
    speaks = jax.process_index() == 0
    index, count = share
    samples = generate_shards(
        args.out, args.total, args.batch, facts, generate, process=index, processes=count,
        log=print if speaks else lambda line: None,
    )  # fmt: skip
    if speaks:
        print(f"{args.total} images in {samples}" if samples else
              f"this share is done; {args.out / 'samples.npz'} follows when all are")  # fmt: skip
    return 0


def _rgb(images):
    import numpy as np

    from monoformer_jax.data.image_io import to_uint8

    pixels = to_uint8(images)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


if __name__ == "__main__":
    run_command("sample", __doc__, add_arguments, main)
