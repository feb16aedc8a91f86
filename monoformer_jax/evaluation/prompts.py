"""Prompts of files, and the folders that the scripts of text-to-image benchmarks read.

    FILE.txt      a prompt a line
    FILE.jsonl    an object with "prompt" a line, as GenEval's evaluation_metadata.jsonl
    FOLDER        NAME.txt a prompt, as DPG-Bench's

geneval   (arXiv 2310.11513)         00000/metadata.jsonl, 00000/samples/0000.png … of each prompt
dpg       (ELLA, arXiv 2403.05135)   NAME.png of each prompt, 2 × 2 pictures

The detectors and question answering models of these benchmarks are not part of this library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from einops import rearrange
from etils import epath

from monoformer_jax.errors import InputError, require
from monoformer_jax.evaluation.image_set import ImageSet, open_image_set
from monoformer_jax.files import atomic_write, read_json

BENCHMARKS = ("geneval", "dpg")
COUNT = 4  # pictures a prompt, as both ask for


class Prompt(NamedTuple):
    """A prompt of a file.

    Attributes:
      name: its file's, or its number.
      text: what a model is asked for.
      line: the line of a .jsonl file.
    """

    name: str
    text: str
    line: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder, see above.

    Raises:
      InputError: no such file, a folder without prompts, text that is not UTF-8, a line of a .jsonl
        file that is not an object with a "prompt".
    """
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        require(bool(files), f"--prompts={path} has no .txt files")
        return [Prompt(file.stem, _text(file).strip()) for file in files]
    require(path.is_file(), f"--prompts={path}: no such file")
    lines = _text(path).split("\n")  # splitlines splits at U+2028 too
    lines = lines[:-1] if lines[-1] == "" else lines
    if path.suffix == ".jsonl":
        return [_parse(path, number, line) for number, line in enumerate(lines)]
    return [Prompt(f"{number:05}", line) for number, line in enumerate(lines)]


def _text(file: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--prompts={file} is not UTF-8 text") from None


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    require(
        isinstance(text, str),
        f'--prompts={path}, line {number + 1}: it is not a JSON object with a "prompt"',
    )
    return Prompt(f"{number:05}", text, line)


def check_benchmark(kind: str, path: Path | None, count: int) -> None:
    """Raises InputError if `path` is not the prompts of a benchmark, or `count` not of its pictures."""
    right = path is not None and (path.is_dir() if kind == "dpg" else path.suffix == ".jsonl")
    form = {"geneval": "its evaluation_metadata.jsonl", "dpg": "the folder of its prompts"}[kind]
    require(right, f"--benchmark={kind} needs --prompts, {form}")
    require(
        kind != "dpg" or count in (1, 4),
        f"--count={count}: DPG-Bench reads 1 picture a prompt, or 4 (2 × 2)",
    )


def write_benchmark(
    kind: str, samples: epath.Path, prompts: Sequence[Prompt], count: int
) -> epath.Path:
    """Writes pictures as a benchmark's script reads them, in a folder of its name beside them.

    Args:
      kind: one of `BENCHMARKS`.
      samples: .npz of `count` pictures for each prompt in turn.
    """
    folder = samples.parent / kind
    for prompt, pictures in zip(prompts, open_image_set(samples).batches(count)):
        if kind == "dpg":
            grid = rearrange(pictures, "(r c) h w d -> (r h) (c w) d", c=1 if count == 1 else 2)
            _write(folder / f"{prompt.name}.png", grid)
            continue
        place = folder / prompt.name
        for number, picture in enumerate(pictures):
            _write(place / "samples" / f"{number:04}.png", picture)
        with atomic_write(place / "metadata.jsonl") as file:
            file.write_text(f"{prompt.line}\n", encoding="utf-8")
    return folder


def _write(path: epath.Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as staging, staging.open("wb") as file:
        PIL.Image.fromarray(pixels).save(file, "PNG")


def facts_of(words: Sequence[str], image: bytes, count: int) -> dict[str, Any]:
    """What the record of `sample --total` says of its prompts; `prompts_of` checks it."""
    asked = "\n".join(words).encode() + b"\0" + image
    return {
        "prompts": len(words),
        "pictures_per_prompt": count,
        "prompts_sha256": hashlib.sha256(asked).hexdigest(),
    }


def prompts_of(images: ImageSet, path: Path | None) -> list[str]:
    """The prompt of each picture of a set.

    Args:
      images: a folder that `sample` wrote, whose record has the prompts; or any other set.
      path: prompts of the pictures in their order, as `sample --total` and `--benchmark` repeat them;
        None: those of the record.

    Raises:
      InputError: prompts that are not known, do not fit the number of pictures, or are not those that
        the pictures were generated from.
    """
    source, count = images.source, 1
    if path is None:
        found = _recorded(source / "samples.json") if images.files else []
        require(
            len(found) == images.count,
            f"{source}: no samples.json of `sample` has the prompts of its {images.count} pictures: "
            "give --prompts",
        )
        return found
    words = [prompt.text for prompt in read_prompts(path)]
    record = source.parent / "sampling.json"
    if not images.files and record.exists():
        known = read_json(record)
        count = known.get("pictures_per_prompt", 1)
        require(
            known.get("prompts_sha256") == facts_of(words, b"", count)["prompts_sha256"],
            f"{source} was generated from other prompts than --prompts={path}",
        )
    words = [word for word in words for _ in range(count)]
    require(
        bool(words) and images.count % len(words) == 0,
        f"--prompts={path} has {len(words)} prompts for the {images.count} pictures of {source}",
    )
    return words * (images.count // len(words))


def _recorded(path: epath.Path) -> list[str]:
    """The prompt of each picture in a record of `sample`; [] without one."""
    try:
        rows = read_json(path)["rows"]
        return [row["prompt"] for row in rows for part in row["answer"] if isinstance(part, dict)]
    except (InputError, KeyError, TypeError):
        return []
