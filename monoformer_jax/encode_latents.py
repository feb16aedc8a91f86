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

Images are decoded by one process per core and encoded on all devices of the host. Several hosts divide
the files: start the same command on each. On TPU pods and Slurm they find each other as in `train`;
elsewhere give each --processes and --process. --from, --to, --labels and --vae may be on storage that
every host can read, such as gs://. SIGTERM ends the command with exit code 75; complete files stay.
"""

from __future__ import annotations

import argparse
import sys

from etils import epath

from monoformer_jax.cli import SEED, integer, run_command, storage_path
from monoformer_jax.errors import PREEMPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source", required=True, help="dataset to convert")
    add("--to", type=storage_path, required=True, help="output folder of the records")
    add("--vae", type=storage_path, help="folder of the autoencoder, for images")
    add("--labels", type=storage_path, help="JSON file of class names")
    add("--image_size", type=integer(1), default=256, help="image side in pixels (default 256)")
    add("--batch_size", type=integer(1), default=32, help="examples encoded per batch (default 32)")
    add("--per_file", type=integer(1), default=4096, help="examples per file (default 4096)")
    add("--seed", type=SEED, default=0, help="seed of the shuffle")
    add("--workers", type=integer(0), help="processes that decode (default one per core)")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    add("--processes", type=integer(1), help="number of processes; 1 disables automatic detection")
    add("--process", type=integer(0), help="index of this process, from 0")


def main(args: argparse.Namespace) -> int:
    import os
    import signal

    import jax

    from monoformer_jax.data.raw import open_raw
    from monoformer_jax.data.templates import read_labels
    from monoformer_jax.errors import require
    from monoformer_jax.runtime.processes import exit_without_barrier, start_share

    labels = None if args.labels is None else read_labels(args.labels)
    examples = open_raw(args.source, labels)
    require(len(examples) > 0, f"--from={args.source} holds no examples")
    share = start_share(args.coordinator, args.processes, args.process)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        _encode_dataset(examples, share, args)
    except _Stopped:
        print("stopped by SIGTERM; the same command resumes", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os._exit(PREEMPTED)  # a normal exit would wait for the others
        return PREEMPTED
    except BaseException as error:
        exit_without_barrier(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class _Stopped(BaseException):
    """SIGTERM was received."""


def _stop(*_):
    raise _Stopped


def _encode_dataset(examples, share: tuple[int, int], args: argparse.Namespace) -> None:
    """Writes the missing ones of this process's files, and info.json if then no file is missing."""
    import contextlib
    import itertools

    import numpy as np

    from monoformer_jax.data.decoding import decode_examples, default_workers
    from monoformer_jax.data.records import write_file
    from monoformer_jax.errors import require
    from monoformer_jax.runtime.processes import run_on_first

    encode, shape = _encoder(args.vae, args.image_size)
    complete = (args.to / "info.json").exists
    run_on_first(
        lambda: require(not complete(), f"--to={args.to} is already complete; nothing was changed")
    )
    args.to.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(examples))
    parts = [order[i : i + args.per_file] for i in range(0, len(order), args.per_file)]
    files = [args.to / f"records-{n:05}-of-{len(parts):05}.array_record" for n in range(len(parts))]
    index, count = share
    missing = [n for n in range(index, len(files), count) if not files[n].exists()]
    mine = [examples[i] for n in missing for i in parts[n]]
    workers = default_workers(len(mine)) if args.workers is None else args.workers
    progress = _Progress(len(mine), len(missing), share)
    with contextlib.closing(decode_examples(mine, args.image_size, workers)) as decoded:
        for number in missing:
            part = itertools.islice(decoded, len(parts[number]))
            write_file(files[number], _encoded(part, encode, args.batch_size, progress.add))
            progress.end_file()
    _finish(files, len(examples), shape, share, args)


def _finish(files, examples: int, shape, share: tuple[int, int], args) -> None:
    import time

    import jax

    from monoformer_jax.data.records import count_records, write_info
    from monoformer_jax.errors import require

    # The last process to finish sees all files. In a jax.distributed run the others wait for it, but
    # not at a barrier, which ends after minutes.
    while not all(file.exists() for file in files):
        if jax.process_count() == 1:
            print(f"process {share[0]} of {share[1]} is done; info.json follows after the last one")
            return
        time.sleep(1)
    if jax.process_index() > 0:
        return
    require(count_records(files) > 0, f"no example of --from={args.source} could be read")
    written = write_info(args.to, files, shape)
    missed = examples - written
    left = f"; {missed} could not be read and were skipped" if missed else ""
    print(f"{args.to}: {written} examples in {len(files)} files{left}")


class _Progress:
    """Images a second and the time left: a bar on a terminal, else a line per file."""

    def __init__(self, examples: int, files: int, share: tuple[int, int]):
        import time

        from tqdm import tqdm

        index, count = share
        self._is_first = index == 0  # the shares of the others are as large
        self._clock, self._begin = time.monotonic, time.monotonic()
        self._examples, self._files, self._images = examples, files, 0
        self._done = {"examples": 0, "files": 0}
        self._name = "files" if count == 1 else f"files of process 0 of {count}"
        self._bar = tqdm(total=examples, unit=" examples", disable=None if self._is_first else True)

    def add(self, examples: int, images: int) -> None:
        self._images += images
        self._done["examples"] += examples
        self._bar.set_postfix_str(f"{self._rate():,.0f} images/s", refresh=False)
        self._bar.update(examples)

    def end_file(self) -> None:
        import datetime

        self._done["files"] += 1
        if not self._is_first or not self._bar.disable:
            return
        done, seconds = self._done["examples"], self._clock() - self._begin
        left = datetime.timedelta(seconds=round(seconds / done * (self._examples - done)))
        print(f"{self._done['files']} of {self._files} {self._name}: {self._rate():,.0f} images/s, "
              f"{left} left", flush=True)  # fmt: skip

    def _rate(self) -> float:
        return self._images / max(self._clock() - self._begin, 1e-9)


def _encoded(decoded, encode, batch_size: int, add):
    """Yields examples with encoded images, in batches; reports examples that cannot be read."""
    import itertools

    import numpy as np

    from monoformer_jax.data.documents import Image
    from monoformer_jax.data.raw import RawImage

    def finish(part, encoded):
        if not isinstance(part, RawImage):
            return part
        mean, logvar = next(encoded)
        return Image(mean, part.denoise, logvar)

    while batch := list(itertools.islice(decoded, batch_size)):
        for example in batch:
            if example.error is not None:
                print(f"skipped: {example.error}", file=sys.stderr)
        pixels = np.concatenate([example.pixels for example in batch])
        encoded = iter(encode(pixels))
        for example in batch:
            if example.error is None:
                yield [finish(part, encoded) for part in example.parts]
        add(len(batch), len(pixels))


def _encoder(vae: epath.Path | None, size: int):
    """Returns a function uint8 [n, size, size, 3] -> [(mean, logvar)], and the shape of a latent."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from monoformer_jax.codecs import open_codec
    from monoformer_jax.config import MeshConfig
    from monoformer_jax.data.image_io import from_uint8
    from monoformer_jax.errors import InputError, require
    from monoformer_jax.parallel import BATCH, make_mesh

    if vae is None:

        def refuse(pixels):
            if len(pixels):
                raise InputError("the dataset has images: give the autoencoder with --vae=DIR")
            return []

        return refuse, None
    codec = open_codec(_on_this_machine(vae))
    require(size % codec.factor == 0, f"--image_size={size} is not a multiple of {codec.factor}")
    # This host's devices alone: the hosts encode different files.
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    sharding = NamedSharding(mesh, BATCH)

    def encode(pixels):
        if not len(pixels):
            return []
        # Padding to a power of two per device limits the number of compilations.
        count = mesh.size << (-(-len(pixels) // mesh.size) - 1).bit_length()
        padded = np.pad(pixels, ((0, count - len(pixels)), (0, 0), (0, 0), (0, 0)))
        encoded = codec.encode(jax.device_put(from_uint8(padded), sharding))
        return list(zip(*encoded))[: len(pixels)]

    side = size // codec.factor
    return encode, [side, side, codec.channels]


def _on_this_machine(folder: epath.Path):
    """The folder, or a copy of it if it is on storage such as gs://."""
    import tempfile

    if "://" not in str(folder):
        return folder
    copy = epath.Path(tempfile.mkdtemp(prefix="vae."))
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


if __name__ == "__main__":
    run_command("encode_latents", __doc__, add_arguments, main)
