"""Converts pictures, captions and conversations to training records.

  python -m monoformer_jax.prepare_data --from=pictures --to=records/pictures --image_size=32
  python -m monoformer_jax.prepare_data --from=imagenet/train --labels=labels.json \\
      --codec=sd_vae --vae=sd-vae-ft-mse --to=records/imagenet
  python -m monoformer_jax.prepare_data --from=ultrachat.jsonl --to=records/ultrachat

--codec says what the records hold of an image: pixels (the default), for a model of pixels, or sd_vae,
the latents of the autoencoder in --vae. --from is one of

  a folder with a .txt beside each picture, its caption; a wording per line
  a folder with metadata.jsonl, .csv or .parquet: file_name and text, as Hugging Face's image folders
  a folder with a folder per class, whose name is the caption; with --labels, those of ImageNet
  a file .jsonl, .json, .csv, .tsv or .parquet with an example per line or row, such as
    {"image": "cat.jpg", "captions": ["a cat", "an animal"]}      an image to generate
    {"image": "cat.jpg", "messages": ["what is it?", "a cat"]}    a conversation about an image
    {"source": "a.jpg", "instruction": "make it red", "target": "b.jpg"}          an edit
    {"texts": ["one", null, "two"], "images": [null, "a.jpg", null]}              a page
    and the forms of JourneyDB, UltraChat, LLaVA, ShareGPT, InstructPix2Pix; docs/your-data.md has all
  tfds:NAME/SPLIT, of tensorflow-datasets, with --labels (extra `tfds`)

A key or column that is not understood ends the command before it writes; --ignore names those that
shall not be read. Images are center-cropped to a square. Examples are shuffled with --seed. The same
command resumes an interrupted run: complete files are not written again. Images and lines that cannot
be read are skipped, reported and counted.

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
    add("--codec", default="pixels", help="pixels (default), or sd_vae: latents of an autoencoder")
    add("--vae", type=storage_path, help="folder of the autoencoder of --codec=sd_vae")
    add("--image_size", type=integer(1), help="image side in pixels (default 32; 256 for sd_vae)")
    add("--channels", type=int, choices=(1, 3), default=3, help="of --codec=pixels: 1 is grey")
    add("--labels", type=storage_path, help="JSON file of class names")
    add("--ignore", default="", metavar="KEY,KEY", help="keys or columns that are not read")
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
    ignored = tuple(key.strip() for key in args.ignore.split(",") if key.strip())
    examples = open_raw(args.source, labels, ignored)
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

    encode, size, channels = _encoder(args)
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
    made = decode_examples(mine, size, workers, channels)
    with contextlib.closing(made) as decoded:
        for number in missing:
            part = itertools.islice(decoded, len(parts[number]))
            write_file(files[number], _encoded(part, encode, args.batch_size, progress))
            progress.end_file()
    _finish(files, len(examples), progress.skipped, share, args)


def _finish(files, examples: int, skipped, share: tuple[int, int], args) -> None:
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
    written = write_info(args.to, files)
    missed = examples - written
    left = f"; {missed} could not be read and were skipped" if missed else ""
    if missed and missed == skipped.total():  # otherwise others, or a run before, skipped some too
        left += f": {', '.join(f'{reason} {n}' for reason, n in sorted(skipped.items()))}"
    print(f"{args.to}: {written} examples in {len(files)} files{left}")


class _Progress:
    """Images a second and the time left: a bar on a terminal, else a line per file.

    Attributes:
      skipped: number of examples by the reason why they were skipped.
    """

    def __init__(self, examples: int, files: int, share: tuple[int, int]):
        import time
        from collections import Counter

        from tqdm import tqdm

        self.skipped: Counter[str] = Counter()
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

    def skip(self, reason: str, message: str | None) -> None:
        self.skipped[reason] += 1
        print(f"skipped: {message}", file=sys.stderr)

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


def _encoded(decoded, encode, batch_size: int, progress: _Progress):
    """Yields examples with encoded images, in batches; reports examples that cannot be used."""
    import itertools

    import numpy as np

    from monoformer_jax.data.documents import Image
    from monoformer_jax.data.forms import RawImage

    def image(part: RawImage, mean, logvar) -> Image:
        return Image(mean, part.denoise, logvar)

    while batch := list(itertools.islice(decoded, batch_size)):
        pixels = np.concatenate([example.pixels for example in batch])
        encoded = iter(encode(pixels))
        for example in batch:
            if example.error is not None:
                progress.skip(example.reason, example.error)
                continue
            parts = [
                image(part, *next(encoded)) if isinstance(part, RawImage) else part
                for part in example.parts
            ]
            arrays = [x for p in parts if isinstance(p, Image) for x in (p.pixels, p.logvar)]
            largest = np.finfo(np.float16).max  # records hold float16
            if all(x is None or (np.abs(x) <= largest).all() for x in arrays):
                yield parts
            else:
                progress.skip("not_finite", f"{example.name}: its latents are not finite")
        progress.add(len(batch), len(pixels))


def _encoder(args: argparse.Namespace):
    """Returns a function uint8 [n, size, size, channels] -> [(mean, logvar)], size and channels."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from monoformer_jax.codecs import IMAGE_CODECS, open_codec
    from monoformer_jax.config import MeshConfig
    from monoformer_jax.data.image_io import from_uint8
    from monoformer_jax.errors import require
    from monoformer_jax.parallel import BATCH, make_mesh

    known = IMAGE_CODECS.keys()
    require(args.codec in known, f"--codec={args.codec} is none of {', '.join(known)}")
    size = args.image_size or IMAGE_CODECS[args.codec].image_size
    if IMAGE_CODECS[args.codec].class_name is None:
        given = "" if args.vae is None else str(args.vae)
        others = " or ".join(name for name in known if name != args.codec)
        require(
            not given, f"--vae={given} is not used by --codec={args.codec}: give --codec={others}"
        )
        return lambda pixels: [(image, None) for image in pixels], size, args.channels
    require(args.vae is not None, f"--codec={args.codec} needs the autoencoder: give --vae=DIR")
    require(args.channels == 3, f"--channels=1 is for pixels, not for --codec={args.codec}")
    codec = open_codec(_on_this_machine(args.vae))
    fits = isinstance(codec, IMAGE_CODECS[args.codec])
    require(fits, f"--vae={args.vae} is not of --codec={args.codec}")
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

    return encode, size, 3


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
    run_command("prepare_data", __doc__, add_arguments, main)
