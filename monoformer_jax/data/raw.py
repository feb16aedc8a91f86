"""Published datasets as they come: where their images are, and what is said about them.

FOLDER/n01440764/*.JPEG …     ImageNet's classes in the order of their names   (with labels)
tfds:imagenet2012/train       the same from tensorflow-datasets                (with labels)
FILE.jsonl or .json           one example a line, or a list of them:
  {"image": "a.jpg", "captions": ["a cat"]}                    ours, an image to paint
  {"image": "a.jpg", "messages": ["what is it?", "a cat"]}     ours, a conversation
  {"img_path": "./000/a.jpg", "prompt": "a cat"}               JourneyDB
  {"id": "0", "data": ["hi", "hello"]}                         UltraChat
  {"image": "a.jpg", "conversations": [{"value": "<image>\\nwhat is it?"}, …]}     LLaVA
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from monoformer_jax.data.templates import class_prompts
from monoformer_jax.errors import InputError, require

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class RawExample:
    """An example whose image has not been opened."""

    name: str  # for messages about it
    captions: Sequence[str] = ()
    messages: Sequence[str] = ()
    image: Callable[[], PIL.Image.Image] | None = None


def open_raw(source: str, labels: Sequence[str] | None) -> Sequence[Callable[[], RawExample]]:
    """Every example of a dataset, each opened when it is called.

    Args:
      source: a folder, a file or tfds:NAME/SPLIT, see the module.
      labels: names of the classes, for those that are numbered.

    Raises:
      InputError: there is no such dataset, or one without the labels that it needs. Calling an
        example raises it where that example is not of a known form.
    """
    if source.startswith("tfds:"):
        return _tfds(source.removeprefix("tfds:"), _need(labels, source))
    path = Path(source)
    if path.is_dir():
        return _class_folders(path, _need(labels, source))
    require(path.is_file(), f"{source} is no folder, no file and not tfds:NAME/SPLIT")
    return _lines(path)


def _need(labels, source: str) -> Sequence[str]:
    require(labels is not None, f"{source} has numbered classes: give their names with --labels")
    return labels


def _class_folders(folder: Path, labels: Sequence[str]) -> list[Callable[[], RawExample]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    require(
        len(classes) == len(labels),
        f"{folder} has {len(classes)} folders of classes, there are names for {len(labels)}",
    )
    return [
        partial(
            RawExample,
            str(file),
            captions=class_prompts(label),
            image=partial(PIL.Image.open, file),
        )
        for path, label in zip(classes, labels)
        for file in sorted(path.iterdir())
        if file.suffix.lower() in _PICTURES
    ]


def _tfds(name: str, labels: Sequence[str]) -> Sequence[Callable[[], RawExample]]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError("tfds: needs pip install 'monoformer_jax[tfds]'") from error
    dataset, _, split = name.partition("/")
    try:
        # The bytes of the file: decoding is left to whoever needs the image.
        source = tfds.data_source(
            dataset, split=split or "train", decoders={"image": tfds.decode.SkipDecoding()}
        )
    except Exception as error:  # of the network, of the disk, of an unprepared dataset
        raise InputError(f"tfds:{name} cannot be opened ({error})") from error

    def example(number: int) -> RawExample:
        row = source[number]
        image = partial(PIL.Image.open, io.BytesIO(row["image"]))
        return RawExample(
            f"tfds:{name} {number}", class_prompts(labels[int(row["label"])]), image=image
        )

    return [partial(example, number) for number in range(len(source))]


def _lines(path: Path) -> list[Callable[[], RawExample]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = _json(text, path)
        require(isinstance(rows, list), f"{path} is no JSON list")
        return [partial(_row, row, path, number) for number, row in enumerate(rows, 1)]
    lines = enumerate(text.splitlines(), 1)
    return [partial(_line, line, path, number) for number, line in lines if line.strip()]


def _line(line: str, path: Path, number: int) -> RawExample:
    return _row(_json(line, f"{path}:{number}"), path, number)


def _json(text: str, where) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error})") from error


def _row(row: dict[str, Any], path: Path, number: int) -> RawExample:
    """One line of any of the forms that the module lists."""
    where = f"{path}:{number}"
    require(isinstance(row, dict), f"{where} is no JSON object")
    picture = row.get("image", row.get("img_path"))
    image = None if picture is None else partial(PIL.Image.open, path.parent / picture)
    if "captions" in row or "prompt" in row:
        captions = row.get("captions") or [f"Please generate an image of {row.get('prompt')}"]
        require(image is not None, f"{where} has captions but no image")
        require(_texts(captions), f"{where}: captions are to be a list of texts")
        return RawExample(where, captions=captions, image=image)
    messages = row.get("messages", row.get("data"))
    if messages is None and "conversations" in row:
        # The place of the image is always the beginning here, as in the original.
        said = [turn.get("value", "") for turn in row["conversations"]]
        messages = [text.replace("<image>", "").strip() for text in said]
    require(
        messages is not None, f"{where} has no captions, prompt, messages, data or conversations"
    )
    require(
        _texts(messages) and len(messages) % 2 == 0,
        f"{where}: a conversation is a list of texts, asked and answered in turn",
    )
    return RawExample(where, messages=messages, image=image)


def _texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)
