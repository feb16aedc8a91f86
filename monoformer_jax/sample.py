"""Continues prompts with a trained model, which decides itself whether to write or to paint.

  python -m monoformer_jax.sample --workdir=runs/digits --prompt="two plus three is"
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="draw a seven" --count=8 --out=7.png
  python -m monoformer_jax.sample --workdir=runs/digits --prompt="read this: " --image=7.png

  python -m monoformer_jax.sample --workdir=runs/imagenet --vae=sd-vae-ft-mse --paint \\
      --prompt="an image of golden retriever"

Text is printed. Where the model answers with <|im_start|> it paints, and the pictures go to --out as
one grid, a row for each prompt. The original's weights never decide to paint: --paint does it for them.
A model of latents needs its autoencoder, a folder of diffusers' AutoencoderKL, to show them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from etils import epath

from monoformer_jax.cli import run_command

_SIDE = 128  # pixels that a picture in the grid has at least, or 8×8 digits would be specks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=epath.Path, required=True, help="of the trained run, a folder or gs://..."
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the weights; bfloat16 halves their memory")  # fmt: skip
    parser.add_argument("--prompt", action="append", required=True, help="may be given many times")
    parser.add_argument(
        "--image", type=Path, help="a picture put after every prompt; its size is a whole multiple "
        "of the model's, as in the grids written here with --count=1",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=1, help="samples of each prompt (default 1)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="grid of pictures")
    parser.add_argument(
        "--labels",
        type=Path,
        help="JSON list of ImageNet's 1000 names; the prompts are its numbers",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompts into the original's chat template"
    )
    parser.add_argument("--paint", action="store_true", help="paint right after the prompts")
    parser.add_argument(
        "--vae", type=Path, help="folder of the autoencoder, for a model of latents"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_tokens", type=int, default=64, help="longest text (default 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the text; 0 (default) is greedy"
    )
    defaults = "default: the config's sampling"
    parser.add_argument("--steps", type=int, help=f"solver steps ({defaults})")
    parser.add_argument("--guidance", type=float, help=f"1 is none ({defaults})")
    parser.add_argument("--solver", choices=("euler", "heun", "ddpm", "ddim"), help=defaults)


def main(args: argparse.Namespace) -> None:
    from monoformer_jax.config import require
    from monoformer_jax.data.documents import Image
    from monoformer_jax.data.tokenizer import open_tokenizer
    from monoformer_jax.generation.image import generate_images
    from monoformer_jax.generation.text import generate_text
    from monoformer_jax.training.checkpoint import load_trained

    for name in ("count", "max_tokens"):
        require(getattr(args, name) > 0, f"--{name}={getattr(args, name)} must be above 0")
    require(args.temperature >= 0, f"--temperature={args.temperature} must be 0 or more")
    config, params, _ = load_trained(args.workdir, args.dtype)
    flags = {name: getattr(args, name) for name in ("steps", "guidance", "solver")}
    flags = {name: value for name, value in flags.items() if value is not None}
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **flags))
    tokenizer = open_tokenizer(config.data, args.workdir, config.model.vocab_size)
    show = _decoder(args.vae, config.model.channels)
    shown = [Image(_read_image(args.image, config), denoise=False)] if args.image else []
    words = _words(args.prompt, args.labels, args.chat)
    prompts = [[prompt, *shown] for prompt in words for _ in range(args.count)]

    answers, painted = [], prompts
    if not args.paint:
        answers, painted = generate_text(
            config, params, tokenizer, prompts,
            max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed,
        ), []  # fmt: skip
    for prompt, answer in zip(prompts, answers):
        text = tokenizer.decode(answer)
        paints = answer[-1] == tokenizer.im_start_id
        print(f"{prompt[0]!r} -> {text!r}{' and a picture' if paints else ''}")
        if paints:
            painted.append([*prompt, text] if text else prompt)
    if painted:
        images = generate_images(
            config, params, tokenizer, painted, sampling=config.sampling, seed=args.seed
        )
        _write_grid(args.out, show(images), columns=args.count)
        print(f"{len(painted)} picture(s) in {args.out}")


def _words(prompts: list[str], labels: Path | None, chat: bool) -> list[str]:
    """The prompts as the model was trained to be asked."""
    from monoformer_jax.config import require
    from monoformer_jax.data import prompts as said

    if labels is not None:
        names = said.read_labels(labels)
        for prompt in prompts:
            require(
                prompt.isdecimal() and int(prompt) < len(names),
                f"--prompt={prompt}: with --labels it is the number of a class, 0 to 999",
            )
        prompts = [said.class_prompts(names[int(prompt)])[0] for prompt in prompts]
    return [said.chat(prompt) for prompt in prompts] if chat else prompts


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


def _decoder(vae: Path | None, channels: int):
    """Function from what the model paints to pixels [B, h, w, 1 or 3]."""
    from monoformer_jax.config import require

    if vae is None:
        require(
            channels in (1, 3),
            f"the model paints latents of {channels} channels: give its autoencoder with --vae=DIR",
        )
        return lambda images: images
    import jax

    from monoformer_jax.models import autoencoder
    from monoformer_jax.pretrained import sd_vae

    config, params = sd_vae.load(vae)
    require(
        config.latent_channels == channels,
        f"--vae={vae} has latents of {config.latent_channels} channels, the model of {channels}",
    )
    return jax.jit(lambda latents: autoencoder.bind(config, params).decode(latents))


def _write_grid(path: Path, images, columns: int) -> None:
    import numpy as np
    import PIL.Image
    from einops import rearrange, repeat

    missing = -len(images) % columns
    images = np.pad(np.asarray(images), ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=-1)
    grid = rearrange(images, "(r c) h w C -> (r h) (c w) C", c=columns)
    scale = max(1, _SIDE // images.shape[2])
    grid = repeat(grid, "h w C -> (h a) (w b) C", a=scale, b=scale)
    pixels = np.clip((grid + 1) * 127.5, 0, 255).round().astype(np.uint8)
    PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


if __name__ == "__main__":
    run_command("sample", __doc__, add_arguments, main)
