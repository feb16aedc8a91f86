"""Converts a dataset to training records, with images encoded to latents of the autoencoder.

  python -m monoformer_jax.encode_latents --from=imagenet/train --labels=labels.json \\
      --vae=sd-vae-ft-mse --to=records/imagenet
  python -m monoformer_jax.encode_latents --from=tfds:imagenet2012/train --labels=labels.json \\
      --vae=sd-vae-ft-mse --to=records/imagenet
  python -m monoformer_jax.encode_latents --from=ultrachat.jsonl --to=records/ultrachat

--from is a folder with one folder of images per class, a dataset of tensorflow-datasets (extra
`tfds`), or a .jsonl or .json file of captions or conversations: JourneyDB, UltraChat, LLaVA, or

  {"image": "cat.jpg", "captions": ["a cat", "an animal"]}        an image to generate
  {"image": "cat.jpg", "messages": ["what is it?", "a cat"]}      a conversation about an image

Images are center-cropped to a square. Examples are shuffled with --seed. The same command resumes an
interrupted run: complete files are not written again. Images and lines that cannot be read are skipped,
reported and counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monoformer_jax.cli import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="dataset to convert")
    parser.add_argument("--to", required=True, help="output folder of the records, local or gs://")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder, for images")
    parser.add_argument("--labels", type=Path, help="JSON file of class names")
    parser.add_argument(
        "--image_size", type=int, default=256, help="image side in pixels (default 256)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="images encoded per batch (default 32)"
    )
    parser.add_argument(
        "--per_file", type=int, default=4096, help="examples per file (default 4096)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")


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
    require(
        not (folder / "info.json").exists(),
        f"--to={folder} is already complete; nothing was changed",
    )
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
    (folder / "info.json").write_text(json.dumps(info) + "\n", encoding="utf-8")
    missed = len(examples) - written
    left = f"; {missed} could not be read and were skipped" if missed else ""
    print(f"{folder}: {written} examples in {len(files)} files{left}")


def _encoded(examples, encode, args):
    """Yields examples with encoded images, in batches; reports examples that cannot be read."""
    import itertools

    from monoformer_jax.data.documents import Image
    from monoformer_jax.data.image_io import crop
    from monoformer_jax.data.raw import RawImage
    from monoformer_jax.errors import InputError

    def read():
        for example in examples:
            try:
                parts = example().parts
                pixels = [crop(p.open(), args.image_size) for p in parts if isinstance(p, RawImage)]
            except (InputError, OSError) as error:  # PIL raises OSError
                print(f"skipped: {error}", file=sys.stderr)
                continue
            yield parts, pixels

    def finish(part, encoded):
        if not isinstance(part, RawImage):
            return part
        mean, logvar = next(encoded)
        return Image(mean, part.denoise, logvar)

    readable = read()
    while batch := list(itertools.islice(readable, args.batch_size)):
        encoded = iter(encode([pixels for _, images in batch for pixels in images]))
        for parts, _ in batch:
            yield [finish(part, encoded) for part in parts]


def _encoder(vae: Path | None, size: int):
    """Returns a function images [n][size, size, 3] -> [(mean, logvar)], and the shape of a latent."""
    import numpy as np

    from monoformer_jax.codecs import open_codec
    from monoformer_jax.errors import InputError, require

    if vae is None:

        def refuse(pictures):
            if pictures:
                raise InputError("the dataset has images: give the autoencoder with --vae=DIR")
            return []

        return refuse, None
    codec = open_codec(vae)
    require(size % codec.factor == 0, f"--image_size={size} is not a multiple of {codec.factor}")

    def encode(pictures):
        if not pictures:
            return []
        # Padding to a power of two limits the number of compilations.
        count = 1 << (len(pictures) - 1).bit_length()
        padded = np.pad(np.stack(pictures), ((0, count - len(pictures)), (0, 0), (0, 0), (0, 0)))
        return list(zip(*codec.encode(padded)))[: len(pictures)]

    side = size // codec.factor
    return encode, [side, side, codec.channels]


if __name__ == "__main__":
    run_command("encode_latents", __doc__, add_arguments, main)
