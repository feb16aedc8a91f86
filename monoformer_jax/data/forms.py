"""Forms of an example in published datasets: a row of named values -> the parts of an example.

    {"image": "a.jpg", "captions": ["a cat"]}                    an image to generate
    {"img_path": "./000/a.jpg", "prompt": "a cat"}               JourneyDB
    {"image": "a.jpg", "text": "a cat"}                          the same; without image: learned text
    {"image": "a.jpg", "messages": ["what is it?", "a cat"]}     user and assistant in turn
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, …]}
    {"images": ["a.jpg", "b.jpg"], "messages": ["<image> make it red", "<image>"]}
    {"id": "0", "data": ["hi", "hello"]}                         UltraChat
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, …]}
                                                                 LLaVA, ShareGPT
    {"source": "a.jpg", "instruction": "make it red", "target": "b.jpg"}     InstructPix2Pix, MagicBrush
    {"texts": ["one", null, "two"], "images": [null, "a.jpg", null]}         a page, as in OBELICS
    {"parts": [{"image": "a.jpg"}, {"prompt": "make it red"}, {"image": "b.jpg", "generate": true}]}

Parts of an example, in reading order: {"text"} has a loss unless "train" is false; {"prompt"}, one
wording or a list, asks for what follows; {"image"} is a conditioning image, or one to generate if
"generate" is true; {"end_of_turn": true} ends an answer.

A key whose value is null or NaN is absent. An example is read for what it says or not at all: a key
that is not understood, or one that answers a question twice, raises InputError, which names the line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image
from etils import epath

from monoformer_jax.data.documents import EndOfTurn, Part, Prompt, UntrainedText
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.templates import chat_parts
from monoformer_jax.errors import BadExample, InputError, require, require_unicode, shorten

# What a row may say, and the keys that say it: those of published datasets.
_KEYS = {
    "image": ("image", "img_path", "file_name"),
    "images": ("images",),
    "captions": ("captions", "caption", "text", "prompt"),
    "talk": ("messages", "data", "conversations"),
    "source": ("source", "input_image", "original_image", "source_img"),
    "instruction": ("instruction", "edit_prompt"),
    "target": ("target", "edited_image", "target_img"),
    "texts": ("texts",),
    "parts": ("parts",),
    "generate": ("generate",),
    "id": ("id",),
}
# Form of an example -> what a row of it says, and what it may say besides.
_FORMS = {
    "parts": ({"parts"}, set()),
    "edit": ({"source", "instruction", "target"}, set()),
    "page": ({"texts", "images"}, {"generate"}),
    "captions": ({"captions"}, {"image", "talk"}),
    "talk": ({"talk"}, {"image", "images", "captions"}),
}
_SPEAKER, _SAID = ("role", "from", "speaker"), ("content", "value", "text")
# Names of the speakers in published conversations -> our role.
_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
             "model": "assistant", "system": "system"}  # fmt: skip
_MARK = "<image>"


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
                    unicode_text(text, f"a text of {self.name}")


def unicode_text(text: str, name: str) -> str:
    """The text; raises BadExample if it has half of a surrogate pair."""
    try:
        require_unicode(text, name)
    except InputError as error:
        raise BadExample("text", str(error)) from error
    return text


def check_keys(row: Mapping[str, Any], where: str, ignored: Iterable[str] = ()) -> None:
    """Raises InputError for a key that is not understood.

    Args:
      row: an example, or its turns: the values of keys with a list of objects are checked too.
      ignored: keys that are not read.
    """
    _known(_given_keys(row), [k for keys in _KEYS.values() for k in keys], where, ignored)
    for key in _KEYS["talk"]:
        for turn in row[key] if isinstance(row.get(key), list) else []:
            if isinstance(turn, Mapping):
                _known(_given_keys(turn), [*_SPEAKER, *_SAID, "id"], f"{where}, a turn", ignored)


def _known(keys: Iterable[str], known: Sequence[str], where: str, ignored: Iterable[str]) -> None:
    for key in keys:
        if key in known or key in ignored:
            continue
        name = shorten(repr(key)[1:-1], 60)
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"{where}: the key '{name}' is not understood: {hint}Give --ignore={name} to "
            f"read the examples without it; known are {', '.join(known)}"
        )


def _given_keys(row: Mapping[str, Any]) -> list[str]:
    return [key for key, value in row.items() if value is not None and not _is_nan(value)]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def forms_of(row: Any, where: str) -> list[str]:
    """The forms in which a row is an example: captions and a conversation about an image are two.

    Raises:
      InputError: none of the forms, or several that exclude each other.
    """
    require(isinstance(row, Mapping), f"{where} is not a JSON object")
    said = {what for what, keys in _KEYS.items() if _given(row, keys, where)} - {"id"}
    found = [form for form, (needed, _) in _FORMS.items() if needed <= said]
    if not found:
        missing = {form: needed - said for form, (needed, _) in _FORMS.items() if needed & said}
        for form, parts in missing.items():
            if form == "edit" or "texts" in said:
                raise InputError(f"{where} has {_names(said)}, but no {_names(parts)}")
        raise InputError(f"{where} has no captions, no conversation, no parts and no texts")
    more = said - set().union(*_FORMS[found[0]])
    require(not more, f"{where} has both {found[0]} and {_names(more)}: keep one of them")
    return found


def _names(said: Iterable[str]) -> str:
    return " and ".join(sorted(said))


def read_row(
    row: Any, folder: epath.Path, where: str, form: str | None = None, ignored: Iterable[str] = ()
) -> RawExample:
    """Reads a row in one of its forms; None: in its only one.

    Args:
      folder: what the paths of images are relative to.
      where: what messages call the row: FILE:LINE.
    """
    if isinstance(row, Mapping):
        row = {key: value for key, value in row.items() if key not in ignored}
    if form is None:
        form, *more = forms_of(row, where)
        require(not more, f"{where} has both {form} and {_names(more)}: keep one of them")
    parts = _READERS[form](_Row(row, folder, where))
    return RawExample(where, parts)


class _Row:
    """A row whose values are asked for by what they say."""

    def __init__(self, values: Mapping[str, Any], folder: epath.Path, where: str):
        self.values, self.folder, self.where = values, folder, where

    def __contains__(self, what: str) -> bool:
        return _given(self.values, _KEYS[what], self.where) is not None

    def key(self, what: str) -> str:
        return _given(self.values, _KEYS[what], self.where) or what

    def __getitem__(self, what: str) -> Any:
        return self.values[self.key(what)]

    def require(self, condition: bool, message: str) -> None:
        require(condition, f"{self.where}: {message}")

    def image(self, source: Any, denoise: bool) -> RawImage:
        """An image by the path of its file, or as Parquet files of images hold it."""
        if isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):
            return RawImage(partial(open_image, source["bytes"]), denoise)
        name = source.get("path") if isinstance(source, Mapping) else source
        good = isinstance(name, str) and bool(name) and "\0" not in name
        self.require(good, f"the image {shorten(repr(name), 60)} is not the path of a file")
        unicode_text(name, f"the image path of {self.where}")
        return RawImage(partial(open_image, self.folder / name), denoise)

    def texts(self, what: str) -> tuple[str, ...]:
        """One text or a list of them, none of them empty."""
        values = [self[what]] if isinstance(self[what], str) else self[what]
        good = isinstance(values, list) and all(isinstance(v, str) for v in values)
        self.require(good, f"{self.key(what)} must hold texts")
        if not values or not all(value.strip() for value in values):
            raise BadExample("empty", f"{self.where}: {self.key(what)} is empty")
        return tuple(values)


def _given(values: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """The one of these keys that has a value other than null and NaN, or None."""
    given = [name for name in names if values.get(name) is not None and not _is_nan(values[name])]
    require(len(given) < 2, f"{where} has both {' and '.join(given)}: keep one of them")
    return given[0] if given else None


def _captions(row: _Row) -> list:
    texts = row.texts("captions")
    if "image" not in row:
        row.require(row.key("captions") == "text", f"{row.key('captions')}, but no image")
        return ["\n".join(texts)]
    if row.key("captions") == "prompt":  # JourneyDB, in the original's words
        texts = tuple(f"Please generate an image of {text}" for text in texts)
    return [Prompt(texts), row.image(row["image"], denoise=True)]


def _edit(row: _Row) -> list:
    return [
        row.image(row["source"], denoise=False),
        Prompt(row.texts("instruction")),
        row.image(row["target"], denoise=True),
    ]


def _page(row: _Row) -> list:
    texts, images = row["texts"], row["images"]
    row.require(
        isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images),
        "texts and images must be lists of one length, with a text or an image at each place",
    )
    parts, denoise = [], "generate" in row and bool(row["generate"])
    for number, (text, image) in enumerate(zip(texts, images), 1):
        row.require(
            (text is None) != (image is None) and isinstance(text, str | None),
            f"place {number} of the page must hold either a text or an image",
        )
        parts.append(row.image(image, denoise) if text is None else text)
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise BadExample("empty", f"{row.where}: the page is empty")
    return parts


def _talk(row: _Row) -> list:
    row.require("image" not in row or "images" not in row, "has both image and images")
    turns, context = _turns(row), []
    if "images" in row:
        _place_images(turns, row)
    elif "image" in row:
        context = [row.image(row["image"], denoise=False)]
    if row.key("talk") == "conversations" and "images" not in row:
        _remove_marks(turns, row, len(context))
    for turn in turns:  # a user may show an image without a word
        shows = bool(context) and turn["role"] == "user"
        said = turn["content"] if isinstance(turn["content"], str) else "an image"
        if not shows and not said.strip():
            raise BadExample("empty", f"{row.where}: a turn is empty")
    # [:-1]: build_document adds the last </s>.
    return [*context, *chat_parts(turns)[:-1]]


def _turns(row: _Row) -> list[dict[str, Any]]:
    """Reads a conversation as roles and contents; a list of texts begins with the user."""
    turns = row["talk"]
    row.require(isinstance(turns, list), "a conversation must be a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
        turns = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    turns = [_turn(turn, row) for turn in turns]
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    row.require(
        bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2),
        "user and assistant must alternate, and the assistant must be last",
    )
    return turns


def _turn(turn: Any, row: _Row) -> dict[str, str]:
    """Reads a turn with its speaker and its text under one of the names of published datasets."""
    row.require(isinstance(turn, Mapping), f"{turn!r} is not a turn with a speaker and a text")
    speaker = _given(turn, _SPEAKER, row.where)
    named = "" if speaker is None else str(turn[speaker])
    row.require(
        named.lower() in _SPEAKERS,
        f"a turn is said by {named!r}: its role, from or speaker must be one of "
        f"{', '.join(_SPEAKERS)}",
    )
    text = _given(turn, _SAID, row.where)
    good = text is not None and isinstance(turn[text], str)
    row.require(good, "a turn has no text as content, value or text")
    return {"role": _SPEAKERS[named.lower()], "content": turn[text]}


def _place_images(turns: list[dict[str, Any]], row: _Row) -> None:
    """Puts the images where <image> stands: those of the assistant are generated."""
    sources, shown = row["images"], sum(turn["content"].count(_MARK) for turn in turns)
    row.require(isinstance(sources, list), "images must be a list")
    row.require(
        shown == len(sources),
        f"the conversation has {len(sources)} images, but {shown} times {_MARK}",
    )
    left = iter(sources)
    for turn in turns:
        first, *rest = (text.strip() for text in turn["content"].split(_MARK))
        content: list = [first]
        for text in rest:
            content += [row.image(next(left), turn["role"] == "assistant"), text]
        if rest:
            turn["content"] = [part for part in content if part != ""]


def _remove_marks(turns: list[dict[str, Any]], row: _Row, images: int) -> None:
    """Removes LLaVA's <image> marks: as in the original, the image is always placed first."""
    shown = sum(turn["content"].count(_MARK) for turn in turns)
    row.require(shown <= images, f"the conversation has {images} images, but shows {shown}")
    for turn in turns:
        if _MARK in turn["content"]:
            turn["content"] = turn["content"].replace(_MARK, "").strip()


def _parts(row: _Row) -> list:
    values = row["parts"]
    row.require(isinstance(values, list), "parts must be a list")
    if not values:
        raise BadExample("empty", f"{row.where}: parts is empty")
    return [_part(part, row) for part in values]


def _part(values: Any, row: _Row) -> Part | Prompt | RawImage:
    """Parses a part in one of the forms of the module docstring."""
    keys = values.keys() if isinstance(values, Mapping) else set()
    if "text" in keys and keys <= {"text", "train"} and isinstance(values["text"], str):
        return values["text"] if values.get("train", True) else UntrainedText(values["text"])
    if keys == {"prompt"} and isinstance(values["prompt"], str | list):
        return Prompt(_Row({"prompt": values["prompt"]}, row.folder, row.where).texts("captions"))
    if "image" in keys and keys <= {"image", "generate"}:
        return row.image(values["image"], denoise=bool(values.get("generate", False)))
    if values == {"end_of_turn": True}:
        return EndOfTurn()
    raise InputError(
        f"{row.where}: the part {values!r} is none of text (with train), prompt, image (with "
        "generate) and end_of_turn"
    )


_READERS = {"parts": _parts, "edit": _edit, "page": _page, "captions": _captions, "talk": _talk}
