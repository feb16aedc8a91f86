"""Converts weights: a Hugging Face folder to a workdir of ours, or back to the original's format.

  python -m monoformer_jax.convert --from=MonoFormer_ImageNet_256 --to=runs/imagenet
  python -m monoformer_jax.convert --from=TinyLlama-1.1B --to=runs/tinyllama
  python -m monoformer_jax.convert --from=runs/imagenet --to=export --format=safetensors --dtype=bf16

--from is a folder with a LLaMA or a MonoFormer (config.json and safetensors or pytorch_model.bin), a
workdir of ours, or the name of such a folder on the Hugging Face hub (extra `hub`). A LLaMA gets the
image parts and four tokens that it lacks, fresh. A workdir becomes `model.safetensors`, with the
averaged weights in `ema/`, under the original's names. The adapters of a workdir (config.lora) are
merged; --format=orbax makes a workdir of the whole model.
The target appears when it is whole, or not at all. Parameters are read and written one at a time;
a workdir holds one copy of the model in memory while it is saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from monoformer_jax.cli import run_command

_DTYPES = {"float32": "float32", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="folder, or name on the hub")
    parser.add_argument("--to", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--format", choices=("orbax", "safetensors"),
        help="a workdir of ours or the original's; default: the one that --from is not",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="float32",
        help="of safetensors (default float32, which changes no bit); a workdir is float32",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="read it again and compare every value"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the parts that a LLaMA lacks")


def main(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # work of the host: no accelerator is claimed

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
        f"--dtype={args.dtype} is for --format=safetensors: the parameters of a workdir are float32",
    )
    require(not args.to.exists(), f"--to={args.to} exists already; nothing was touched")
    weights = open_source(source, args.seed)
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
            print("no tokenizer.json: config.json gives special tokens the original's usual ids")
    checked = ", read again and equal" if args.check else ""
    print(f"{args.to}: {form}{checked}")


def _bar(what: str):
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=what, disable=None)


def _summary(weights) -> str:
    """One line a parameter: ours, its shape, theirs."""
    import math

    from monoformer_jax.pretrained import monoformer as original
    from monoformer_jax.pretrained.table import by_path

    shapes = {path: leaf.shape for path, leaf in by_path(weights.ema).items()}
    mapped = set(weights.mapped)
    lines = []
    for entry in original.table(weights.config.model):
        theirs = entry.name.replace("{}", "*") if entry.path in mapped else "(fresh)"
        lines.append(f"{entry.path:<38} {shapes[entry.path]!s:<24} {theirs}")
    total = sum(math.prod(shape) for shape in shapes.values())
    if weights.left_out:
        lines.append(
            f"left out: {len(weights.left_out)} tensors of a frozen vision encoder, which has its own "
            f"folder: {weights.left_out[0]} …"
        )
    lines.append(f"{total:,} parameters, the padding of the vocabulary included")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command("convert", __doc__, add_arguments, main)
