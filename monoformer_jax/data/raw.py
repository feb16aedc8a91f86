"""Readers of published datasets: their images, and captions or conversations.

FOLDER/n01440764/*.JPEG …     ImageNet class folders, sorted by name   (with labels)
tfds:imagenet2012/train       the same from tensorflow-datasets        (with labels)
FILE.jsonl or .json           one example per line, or a list of them:
  {"image": "a.jpg", "captions": ["a cat"]}                    an image to generate
  {"image": "a.jpg", "messages": ["what is it?", "a cat"]}     user and assistant in turn
  {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, …]}
  {"parts": [{"image": "a.jpg"}, {"prompt": "make it red"}, {"image": "b.jpg", "generate": true}]}
  {"img_path": "./000/a.jpg", "prompt": "a cat"}               JourneyDB
  {"id": "0", "data": ["hi", "hello"]}                         UltraChat
  {"image": "a.jpg", "conversations": [{"value": "<image>\\nwhat is it?"}, …]}     LLaVA

Parts of an example, in reading order: {"text"} has a loss unless "train" is false; {"prompt"}, one
wording or a list, asks for what follows; {"image"} is a conditioning image, or one to generate if
"generate" is true; {"end_of_turn": true} ends an answer.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from monoformer_jax.data.documents import EndOfTurn, Part, Prompt, UntrainedText
from monoformer_jax.data.templates import ROLES, chat_parts, class_prompts
from monoformer_jax.errors import InputError, require

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class RawImage:
    """An image of an example, not opened yet."""

    open: Callable[[], PIL.Image.Image]
    denoise: bool


@dataclasses.dataclass(frozen=True)
class RawExample:
    """The parts of an example, with images not opened yet."""

    name: str  # for error messages
    parts: Sequence[Part | Prompt | RawImage]


def open_raw(source: str, labels: Sequence[str] | None) -> Sequence[Callable[[], RawExample]]:
    """Returns the examples of a dataset; calling an example reads it.

    Args:
      source: a folder, a file or tfds:NAME/SPLIT, see the module docstring.
      labels: class names, for datasets with numbered classes.

    Raises:
      InputError: no such dataset, or missing labels. Calling an example raises it if the example has
        an unknown format.
    """
    if source.startswith("tfds:"):
        return _tfds(source.removeprefix("tfds:"), _require_labels(labels, source))
    path = Path(source)
    if path.is_dir():
        return _class_folders(path, _require_labels(labels, source))
    require(path.is_file(), f"{source} is not a folder, a file or tfds:NAME/SPLIT")
    return _lines(path)


def _require_labels(labels, source: str) -> Sequence[str]:
    require(labels is not None, f"{source} has numbered classes: give their names with --labels")
    return labels


def _class_folders(folder: Path, labels: Sequence[str]) -> list[Callable[[], RawExample]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    require(
        len(classes) == len(labels),
        f"{folder} has {len(classes)} class folders, but there are {len(labels)} class names",
    )
    return [
        partial(_captioned, str(file), class_prompts(label), partial(PIL.Image.open, file))
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
        # Undecoded bytes: images are decoded only when they are opened.
        source = tfds.data_source(
            dataset, split=split or "train", decoders={"image": tfds.decode.SkipDecoding()}
        )
    except Exception as error:  # network, disk, or an unprepared dataset
        raise InputError(f"tfds:{name} cannot be opened ({error})") from error

    def example(number: int) -> RawExample:
        row = source[number]
        image = partial(PIL.Image.open, io.BytesIO(row["image"]))
        return _captioned(f"tfds:{name} {number}", class_prompts(labels[int(row["label"])]), image)

    return [partial(example, number) for number in range(len(source))]


def _lines(path: Path) -> list[Callable[[], RawExample]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = _json(text, path)
        require(isinstance(rows, list), f"{path} is not a JSON list")
        return [partial(_row, row, path, number) for number, row in enumerate(rows, 1)]
    lines = enumerate(text.splitlines(), 1)
    return [partial(_line, line, path, number) for number, line in lines if line.strip()]


def _line(line: str, path: Path, number: int) -> RawExample:
    return _row(_json(line, f"{path}:{number}"), path, number)


def _json(text: str, where) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error})") from error


def _row(row: dict[str, Any], path: Path, number: int) -> RawExample:
    """Parses one example in any format of the module docstring."""
    where = f"{path}:{number}"
    require(isinstance(row, dict), f"{where} is not a JSON object")
    if "parts" in row:
        parts = row["parts"]
        require(isinstance(parts, list) and bool(parts), f"{where}: parts must be a list")
        return RawExample(where, [_part(part, path, where) for part in parts])
    picture = row.get("image", row.get("img_path"))
    image = None if picture is None else partial(PIL.Image.open, path.parent / picture)
    if "captions" in row or "prompt" in row:
        captions = row.get("captions") or [f"Please generate an image of {row.get('prompt')}"]
        require(image is not None, f"{where} has captions but no image")
        require(_texts(captions), f"{where}: captions must be a list of texts")
        return _captioned(where, captions, image)
    messages = row.get("messages", row.get("data"))
    if messages is None and "conversations" in row:
        # As in the original, the image is always placed first.
        messages = [turn.get("value", "") for turn in row["conversations"]]
        messages = [text.replace("<image>", "").strip() for text in messages]
    require(
        messages is not None,
        f"{where} has no parts, captions, prompt, messages, data or conversations",
    )
    context = [] if image is None else [RawImage(image, denoise=False)]
    # [:-1]: build_document adds the last </s>.
    return RawExample(where, [*context, *chat_parts(_turns(messages, where))[:-1]])


def _captioned(where: str, captions: Sequence[str], image: Callable) -> RawExample:
    return RawExample(where, [Prompt(tuple(captions)), RawImage(image, denoise=True)])


def _part(values: Any, path: Path, where: str) -> Part | Prompt | RawImage:
    """Parses a part in one of the forms of the module docstring."""
    keys = values.keys() if isinstance(values, Mapping) else set()
    if "text" in keys and keys <= {"text", "train"} and isinstance(values["text"], str):
        return values["text"] if values.get("train", True) else UntrainedText(values["text"])
    if keys == {"prompt"}:
        texts = values["prompt"]
        texts = [texts] if isinstance(texts, str) else texts
        if _texts(texts):
            return Prompt(tuple(texts))
    if "image" in keys and keys <= {"image", "generate"} and isinstance(values["image"], str):
        image = partial(PIL.Image.open, path.parent / values["image"])
        return RawImage(image, denoise=bool(values.get("generate", False)))
    if values == {"end_of_turn": True}:
        return EndOfTurn()
    raise InputError(
        f"{where}: the part {values!r} is none of text (with train), prompt, image (with generate) "
        "and end_of_turn"
    )


def _turns(messages: Any, where: str) -> list[dict[str, str]]:
    """Converts messages to roles and contents; without roles, user and assistant alternate."""
    if _texts(messages):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(messages)
        ]
    good = isinstance(messages, list) and all(
        isinstance(turn, Mapping)
        and turn.keys() == {"role", "content"}
        and turn["role"] in ROLES
        and isinstance(turn["content"], str)
        for turn in messages
    )
    roles = [turn["role"] for turn in messages if turn["role"] != "system"] if good else []
    good = bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)
    require(
        good,
        f"{where}: a conversation must be a list of texts, or of {{'role': {' or '.join(ROLES)}, "
        "'content': a text}; user and assistant must alternate, and the assistant must be last",
    )
    return messages


def _texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)
