"""Writes a dataset as records that training reads, its images as latents of the autoencoder.

  python -m monoformer_jax.encode_latents --from=imagenet/train --labels=labels.json \\
      --vae=sd-vae-ft-mse --to=records/imagenet
  python -m monoformer_jax.encode_latents --from=tfds:imagenet2012/train --labels=labels.json \\
      --vae=sd-vae-ft-mse --to=records/imagenet
  python -m monoformer_jax.encode_latents --from=ultrachat.jsonl --to=records/ultrachat

--from is a folder with a folder of pictures for each class, a dataset of tensorflow-datasets (extra
`tfds`), or a .jsonl or .json of captions or conversations: JourneyDB's, UltraChat's, LLaVA's, or

  {"image": "cat.jpg", "captions": ["a cat", "an animal"]}        an image to paint
  {"image": "cat.jpg", "messages": ["what is it?", "a cat"]}      a conversation about an image

A picture is cut to its central square. Examples are stored in an order drawn with --seed. A run that
was stopped goes on with the same command: files that are whole are not written again. Pictures and
lines that cannot be read are left out, named and counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monoformer_jax.cli import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="the dataset")
    parser.add_argument("--to", required=True, help="folder of the records, gs:// too")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder, for pictures")
    parser.add_argument("--labels", type=Path, help="JSON of the names of numbered classes")
    parser.add_argument("--image_size", type=int, default=256, help="side in pixels (default 256)")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="pictures at a time (default 32)"
    )
    parser.add_argument("--per_file", type=int, default=4096, help="examples a file (default 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the order")


def main(args: argparse.Namespace) -> None:
    import json

    import numpy as np
    from etils import epath
    from tqdm import tqdm

    from monoformer_jax.data.raw import open_raw
    from monoformer_jax.data.records import count_records, write_file
    from monoformer_jax.data.templates import read_labels
    from monoformer_jax.errors import require

    for name in ("image_size", "batch_size", "per_file"):
        require(getattr(args, name) > 0, f"--{name}={getattr(args, name)} must be above 0")
    labels = None if args.labels is None else read_labels(args.labels)
    examples = open_raw(args.source, labels)
    require(len(examples) > 0, f"--from={args.source} holds no examples")
    encode, shape = _encoder(args.vae, args.image_size)
    folder = epath.Path(args.to)
    require(not (folder / "info.json").exists(), f"--to={folder} is finished; nothing was touched")
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(examples))
    parts = [order[i : i + args.per_file] for i in range(0, len(order), args.per_file)]
    files = [
        folder / f"records-{number:05}-of-{len(parts):05}.array_record"
        for number in range(len(parts))
    ]
    for part, file in zip(tqdm(parts, desc="files", disable=None), files):
        if not file.exists():
            write_file(file, _encoded((examples[i] for i in part), encode, args))
    written = count_records(files)
    require(written > 0, f"no example of --from={args.source} could be read")
    info = {"examples": written, "files": len(files), "shape": shape}
    (folder / "info.json").write_text(json.dumps(info) + "\n")
    missed = len(examples) - written
    left = f"; {missed} could not be read and were left out" if missed else ""
    print(f"{folder}: {written} examples in {len(files)} files{left}")


def _encoded(examples, encode, args):
    """Examples with their latents, a batch of pictures at a time; those unread are named."""
    import itertools

    from monoformer_jax.data.image_io import crop
    from monoformer_jax.data.records import Example
    from monoformer_jax.errors import InputError

    def read():
        for example in examples:
            try:
                raw = example()
                pixels = None if raw.image is None else crop(raw.image(), args.image_size)
            except (InputError, OSError) as error:  # PIL's errors are the latter
                print(f"left out: {error}", file=sys.stderr)
                continue
            yield raw, pixels

    readable = read()
    while batch := list(itertools.islice(readable, args.batch_size)):
        latents = iter(encode([pixels for _, pixels in batch if pixels is not None]))
        for raw, pixels in batch:
            mean, logvar = (None, None) if pixels is None else next(latents)
            yield Example(raw.captions, raw.messages, mean, logvar)


def _encoder(vae: Path | None, size: int):
    """Pictures [n][size, size, 3] -> their (mean, logvar) float16, and the shape of one."""
    import numpy as np

    from monoformer_jax.errors import InputError, require

    if vae is None:

        def refuse(pictures):
            if pictures:
                raise InputError("there are pictures: give the autoencoder with --vae=DIR")
            return []

        return refuse, None
    import jax

    from monoformer_jax.nn import autoencoder
    from monoformer_jax.pretrained import sd_vae

    config, params = sd_vae.load(vae)
    require(size % config.factor == 0, f"--image_size={size} is not a multiple of {config.factor}")

    @jax.jit
    def moments(pictures):
        m = autoencoder.bind(config, params).encode(pictures)
        return m.mean * config.scale, m.log_variance + 2 * np.log(config.scale)

    def encode(pictures):
        if not pictures:
            return []
        # Filled up to a power of two, so that few sizes are compiled.
        room = 1 << (len(pictures) - 1).bit_length()
        filled = np.pad(np.stack(pictures), ((0, room - len(pictures)), (0, 0), (0, 0), (0, 0)))
        mean, logvar = (np.asarray(x, np.float16) for x in moments(filled))
        return list(zip(mean, logvar))[: len(pictures)]

    side = size // config.factor
    return encode, [side, side, config.latent_channels]


if __name__ == "__main__":
    run_command("encode_latents", __doc__, add_arguments, main)
