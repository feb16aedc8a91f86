"""Continues prompts with a trained model, which decides itself whether to write or to paint.

  python -m monoformer_jax.sample --workdir=runs/digits --prompt="two plus three is"
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="draw a seven" --count=8 --out=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="read this: " --image=7.png

Text is printed. Where the model answers with <|im_start|> it paints, and the pictures go to --out as
one grid, a row for each prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from monoformer_jax.cli import run_command

_SCALE = 16  # pixels a value in the grid, or 8×8 digits would be specks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--prompt", action="append", required=True, help="may be given many times")
    parser.add_argument(
        "--image", type=Path, help="a picture put after every prompt; its size is a whole multiple "
        "of the model's, as in the grids written here with --count=1",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=1, help="samples of each prompt (default 1)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="grid of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_tokens", type=int, default=64, help="longest text (default 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the text; 0 (default) is greedy"
    )
    defaults = "default: the config's sampling"
    parser.add_argument("--steps", type=int, help=f"solver steps ({defaults})")
    parser.add_argument("--guidance", type=float, help=f"1 is none ({defaults})")
    parser.add_argument("--solver", choices=("euler", "heun"), help=defaults)


def main(args: argparse.Namespace) -> None:
    from monoformer_jax.config import require
    from monoformer_jax.data.documents import Image
    from monoformer_jax.data.tokenizer import ByteTokenizer
    from monoformer_jax.generation.image import generate_images
    from monoformer_jax.generation.text import generate_text
    from monoformer_jax.training.checkpoint import load_trained

    for name in ("count", "max_tokens"):
        require(getattr(args, name) > 0, f"--{name}={getattr(args, name)} must be above 0")
    require(args.temperature >= 0, f"--temperature={args.temperature} must be 0 or more")
    config, params, _ = load_trained(args.workdir)
    flags = {name: getattr(args, name) for name in ("steps", "guidance", "solver")}
    flags = {name: value for name, value in flags.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **flags)
    tokenizer = ByteTokenizer()
    shown = [Image(_read_image(args.image, config), denoise=False)] if args.image else []
    prompts = [[prompt, *shown] for prompt in args.prompt for _ in range(args.count)]

    answers = generate_text(
        config, params, tokenizer, prompts,
        max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed,
    )  # fmt: skip
    painted = []
    for prompt, answer in zip(prompts, answers):
        text = tokenizer.decode(answer)
        paints = answer[-1] == tokenizer.im_start_id
        print(f"{prompt[0]!r} -> {text!r}{' and a picture' if paints else ''}")
        if paints:
            painted.append([*prompt, text] if text else prompt)
    if painted:
        images = generate_images(
            config, params, tokenizer, painted, sampling=sampling, seed=args.seed
        )
        _write_grid(args.out, images, columns=args.count)
        print(f"{len(painted)} picture(s) in {args.out}")


def _read_image(path: Path, config):
    """Float [size, size, C] in [-1, 1]; a picture of k times the size is averaged over k × k."""
    import numpy as np
    import PIL.Image
    from einops import reduce

    from monoformer_jax.config import require

    require(path.is_file(), f"--image={path}: there is no such file")
    size, channels = config.data.image_size, config.model.channels
    modes = {1: "L", 3: "RGB"}
    require(channels in modes, f"a model of {channels} channels reads no pixels")
    try:
        picture = PIL.Image.open(path).convert(modes[channels])
    except PIL.UnidentifiedImageError:
        require(False, f"--image={path} is no picture that can be read")
    width, height = picture.size
    require(
        width == height and width % size == 0,
        f"--image={path} is {width}×{height}; this model sees {size}×{size} or a multiple of it",
    )
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels)
    return reduce(pixels, "(h a) (w b) c -> h w c", "mean", h=size, w=size) / 127.5 - 1


def _write_grid(path: Path, images, columns: int) -> None:
    import numpy as np
    import PIL.Image
    from einops import rearrange, repeat

    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=-1)
    grid = rearrange(images, "(r c) h w C -> (r h) (c w) C", c=columns)
    grid = repeat(grid, "h w C -> (h a) (w b) C", a=_SCALE, b=_SCALE)
    pixels = np.clip((grid + 1) * 127.5, 0, 255).round().astype(np.uint8)
    PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


if __name__ == "__main__":
    run_command("sample", __doc__, add_arguments, main)
