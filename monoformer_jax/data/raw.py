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
  {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, …]}
                                                               LLaVA, ShareGPT

Parts of an example, in reading order: {"text"} has a loss unless "train" is false; {"prompt"}, one
wording or a list, asks for what follows; {"image"} is a conditioning image, or one to generate if
"generate" is true; {"end_of_turn": true} ends an answer.

A key whose value is null or NaN is absent. An example is read for what it says or not at all: one that
answers a question twice or not at all raises InputError, which names its line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
from etils import epath

from monoformer_jax.data.documents import EndOfTurn, Part, Prompt, UntrainedText
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.templates import chat_parts, class_prompts
from monoformer_jax.errors import InputError, require, require_unicode

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMS = ("parts", "captions", "prompt", "messages", "data", "conversations")
# Names of the speakers in published conversations -> our role.
_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
             "model": "assistant", "system": "system"}  # fmt: skip


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

    def __post_init__(self):
        for part in self.parts:
            for text in getattr(part, "texts", [getattr(part, "text", part)]):
                if isinstance(text, str):
                    require_unicode(text, f"a text of {self.name}")


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
    path = epath.Path(source)
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
        partial(_captioned, str(file), class_prompts(label), partial(open_image, file))
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
        image = partial(open_image, row["image"])
        return _captioned(f"tfds:{name} {number}", class_prompts(labels[int(row["label"])]), image)

    return [partial(example, number) for number in range(len(source))]


def _lines(path: Path) -> list[Callable[[], RawExample]]:
    # A byte that is not UTF-8 becomes half of a surrogate pair, which only the line with it refuses.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    rows = _json_list(text, path) if path.suffix == ".json" else None
    if rows is not None:
        return [partial(_row, row, path, number) for number, row in enumerate(rows, 1)]
    # Unlike splitlines, which also splits at characters that may be part of a text of JSON.
    lines = enumerate(text.split("\n"), 1)
    return [partial(_line, line, path, number) for number, line in lines if line.strip()]


def _json_list(text: str, path: Path) -> list | None:
    """The examples of a JSON file, or None if it holds JSON Lines, as many published .json files do."""
    if not text.lstrip().startswith("["):
        try:
            return [json.loads(text)]
        except json.JSONDecodeError:
            return None
    return _json(text, path)


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
    form = _given(row, _FORMS, where)
    require(form is not None, f"{where} has no {', '.join(_FORMS[:-1])} or {_FORMS[-1]}")
    values = row[form]
    if form == "parts":
        require(isinstance(values, list) and bool(values), f"{where}: parts must be a list")
        return RawExample(where, [_part(part, path, where) for part in values])
    picture = _given(row, ("image", "img_path"), where)
    image = None if picture is None else _image(row[picture], path, where)
    if form in ("captions", "prompt"):
        captions = values if form == "captions" else [values]
        require(image is not None, f"{where} has {form} but no image")
        require(_texts(captions), f"{where}: {form} must hold texts that are not empty")
        if form == "prompt":
            captions = [f"Please generate an image of {values}"]
        return _captioned(where, captions, image)
    context = [] if image is None else [RawImage(image, denoise=False)]
    # [:-1]: build_document adds the last </s>.
    turns = _turns(values, where)
    if form == "conversations":
        _remove_marks(turns, where, len(context))
    for turn in turns:  # a user may show an image without a word
        shows = image is not None and turn["role"] == "user"
        require(shows or bool(turn["content"].strip()), f"{where}: a turn is empty")
    return RawExample(where, [*context, *chat_parts(turns)[:-1]])


def _given(values: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """The one of these keys that has a value other than null and NaN, or None."""
    given = [name for name in names if values.get(name) is not None and not _is_nan(values[name])]
    require(len(given) < 2, f"{where} has both {' and '.join(given)}: keep one of them")
    return given[0] if given else None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _image(name: Any, path: Path, where: str) -> Callable[[], PIL.Image.Image]:
    good = isinstance(name, str) and bool(name) and "\0" not in name
    require(good, f"{where}: the image {name!r} is not the path of a file")
    require_unicode(name, f"the image path of {where}")
    return partial(open_image, path.parent / name)


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
    if "image" in keys and keys <= {"image", "generate"}:
        image = _image(values["image"], path, where)
        return RawImage(image, denoise=bool(values.get("generate", False)))
    if values == {"end_of_turn": True}:
        return EndOfTurn()
    raise InputError(
        f"{where}: the part {values!r} is none of text (with train), prompt, image (with generate) "
        "and end_of_turn"
    )


def _turns(turns: Any, where: str) -> list[dict[str, str]]:
    """Reads a conversation as roles and contents; a list of texts begins with the user."""
    require(isinstance(turns, list), f"{where}: a conversation must be a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
        turns = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    turns = [_turn(turn, where) for turn in turns]
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    require(
        bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2),
        f"{where}: user and assistant must alternate, and the assistant must be last",
    )
    return turns


def _turn(turn: Any, where: str) -> dict[str, str]:
    """Reads a turn with its speaker and its text under one of the names of published datasets."""
    require(isinstance(turn, Mapping), f"{where}: {turn!r} is not a turn with a speaker and a text")
    speaker = _given(turn, ("role", "from", "speaker"), where)
    named = "" if speaker is None else str(turn[speaker])
    require(
        named.lower() in _SPEAKERS,
        f"{where}: a turn is said by {named!r}: its role, from or speaker must be one of "
        f"{', '.join(_SPEAKERS)}",
    )
    text = _given(turn, ("content", "value", "text"), where)
    good = text is not None and isinstance(turn[text], str)
    require(good, f"{where}: a turn has no text as content, value or text")
    return {"role": _SPEAKERS[named.lower()], "content": turn[text]}


def _remove_marks(turns: list[dict[str, str]], where: str, images: int) -> None:
    """Removes LLaVA's <image> marks: as in the original, the image is always placed first."""
    shown = sum(turn["content"].count("<image>") for turn in turns)
    require(shown <= images, f"{where}: the conversation has {images} images, but shows {shown}")
    for turn in turns:
        if "<image>" in turn["content"]:
            turn["content"] = turn["content"].replace("<image>", "").strip()


def _texts(values: Any) -> bool:
    """Whether this is a list of one or more texts, none of them empty."""
    good = isinstance(values, list) and bool(values)
    return good and all(isinstance(value, str) and value.strip() for value in values)
