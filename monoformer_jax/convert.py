"""Converts weights from a Hugging Face folder to a workdir, or back to the original format.

  python -m monoformer_jax.convert --from=MonoFormer_ImageNet_256 --to=runs/imagenet
  python -m monoformer_jax.convert --from=TinyLlama-1.1B --to=runs/tinyllama
  python -m monoformer_jax.convert --from=runs/imagenet --to=export --format=safetensors --dtype=bf16

--from is a folder with a LLaMA or a MonoFormer (config.json and safetensors or pytorch_model.bin), a
workdir, or the name of a model on the Hugging Face hub (extra `hub`). The image layers and the four
special tokens that a LLaMA lacks are newly initialised. A workdir is converted to
`model.safetensors`, with the EMA weights in `ema/` (or alone: --weights=ema), under the original's
parameter names, which `monoformer_jax.load` reads as it reads a workdir. LoRA
adapters (config.lora) are merged; --format=orbax writes the merged model as a workdir.
--to is only created once it is complete. Parameters are read and written one at a time, except that
writing a workdir takes memory for one copy of the model.
"""

from __future__ import annotations

import argparse
import dataclasses

from monoformer_jax.cli import SEED, local_path, run_command

_DTYPES = {"float32": "float32", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="folder, or hub model name")
    parser.add_argument("--to", type=local_path, required=True, help="folder to create")
    parser.add_argument(
        "--format", choices=("orbax", "safetensors"),
        help="orbax: a workdir; safetensors: the original format; default: the one --from is not",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="float32",
        help="dtype of the safetensors (default float32, lossless); a workdir is always float32",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("all", "ema"), default="all",
        help="ema: the EMA weights alone, as one model; default: also those without averaging",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="read the result back and compare every value"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of newly initialised parameters")


def main(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to other processes

    from monoformer_jax.errors import require
    from monoformer_jax.pretrained.conversion import (
        check_safetensors,
        check_workdir,
        find_source,
        open_source,
        write_safetensors_folder,
        write_workdir,
    )

    source = find_source(args.source)
    form = args.format or ("safetensors" if source.ours else "orbax")
    require(
        form == "safetensors" or args.dtype == "float32",
        f"--dtype={args.dtype} needs --format=safetensors: the parameters of a workdir are float32",
    )
    require(not args.to.exists(), f"--to={args.to} already exists; nothing was changed")
    weights = open_source(source, args.seed)
    if args.weights == "ema":
        weights = dataclasses.replace(weights, params=None)
    print(_summary(weights))
    if form == "orbax":
        write_workdir(args.to, weights, _bar("reading"))
        if args.check:
            check_workdir(args.to, weights)
    else:
        write_safetensors_folder(args.to, weights, _DTYPES[args.dtype], _bar("writing"))
        if args.check:
            check_safetensors(args.to, weights, _DTYPES[args.dtype])
        if not (args.to / "tokenizer.json").is_file():
            print("no tokenizer.json: config.json has the original's default ids of special tokens")
    checked = ", read again and equal" if args.check else ""
    print(f"{args.to}: {form}{checked}")


def _bar(what: str):
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=what, disable=None)


def _summary(weights) -> str:
    """One line per parameter: its path, its shape and the original's tensor name."""
    import math

    from monoformer_jax.pretrained.model import key_table
    from monoformer_jax.pretrained.table import by_path

    shapes = {path: leaf.shape for path, leaf in by_path(weights.ema).items()}
    mapped = set(weights.mapped)
    lines = []
    for entry in key_table(weights.config.model):
        theirs = entry.name.replace("{}", "*") if entry.path in mapped else "(new)"
        lines.append(f"{entry.path:<38} {shapes[entry.path]!s:<24} {theirs}")
    total = sum(math.prod(shape) for shape in shapes.values())
    if weights.left_out:
        lines.append(
            f"skipped: {len(weights.left_out)} tensors of the frozen vision encoder, which is loaded "
            f"from its own folder: {weights.left_out[0]} …"
        )
    lines.append(f"{total:,} parameters, the padding of the vocabulary included")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command("convert", __doc__, add_arguments, main)
