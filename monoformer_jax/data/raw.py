"""Readers of datasets as people have them: folders of pictures, tables, and files of JSON.

FOLDER/cat.jpg, FOLDER/cat.txt …          a .txt beside each picture, a wording of its caption per line
FOLDER/metadata.jsonl, .csv or .parquet   a Hugging Face image folder: file_name and a caption
FOLDER/cats/1.jpg …                       a folder per class, whose name is the caption
FOLDER/n01440764/*.JPEG …                 the classes of ImageNet, sorted by name      (with labels)
tfds:imagenet2012/train                   the same from tensorflow-datasets            (with labels)
FILE.jsonl or .json                       one example per line, or a list of them
FILE.csv, .tsv or .parquet                one example per row

The forms of an example, as JSON or as columns, are those of `data.forms`. Text files are UTF-8, with
or without a byte order mark, and with the line ends of any system. Paths of images are relative to the
file that names them.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from etils import epath

from monoformer_jax.data.documents import Prompt
from monoformer_jax.data.forms import (
    RawExample,
    RawImage,
    check_keys,
    forms_of,
    read_row,
    unicode_text,
)
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.templates import class_prompts
from monoformer_jax.errors import BadExample, InputError, require

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

Examples = Sequence[Callable[[], RawExample]]


def open_raw(
    source: str, labels: Sequence[str] | None = None, ignored: Sequence[str] = ()
) -> Examples:
    """Returns the examples of a dataset; calling an example reads it.

    Args:
      source: a folder, a file or tfds:NAME/SPLIT, see the module docstring.
      labels: class names, for datasets with numbered classes.
      ignored: keys or columns that are not read.

    Raises:
      InputError: no such dataset, missing labels, or a key that is not understood. Calling an example
        raises it, often as `BadExample`, if that example cannot be read.
    """
    if source.startswith("tfds:"):
        require(
            labels is not None, f"{source} has numbered classes: give their names with --labels"
        )
        return _tfds(source.removeprefix("tfds:"), labels)
    path = epath.Path(source)
    if path.is_dir():
        found = [path / name for name in _METADATA if (path / name).is_file()]
        if not found:
            return _class_folders(path, labels) if labels else _folder(path)
        require(len(found) == 1, f"{source} has {' and '.join(f.name for f in found)}: keep one")
        path = found[0]
    require(path.is_file(), f"{source} is not a folder, a file or tfds:NAME/SPLIT")
    if path.suffix == ".parquet":
        return _parquet(path, ignored)
    # A byte that is not UTF-8 becomes half of a surrogate pair, which only the row with it refuses.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    if path.suffix in (".csv", ".tsv"):
        return _csv(text, path, ignored)
    return _json_file(text, path, ignored)


def _class_folders(folder: epath.Path, labels: Sequence[str]) -> Examples:
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


def _folder(folder: epath.Path) -> Examples:
    """Pictures with a .txt beside each, or else in folders that are named after their class."""
    files = list(_walk(folder))
    pictures = [file for file in files if file.suffix.lower() in _PICTURES]
    require(bool(pictures), f"{folder} holds no pictures ({', '.join(_PICTURES)})")
    captions = {f.with_suffix(""): f for f in files if f.suffix.lower() not in _PICTURES}
    stems = [file.with_suffix("") for file in pictures]
    if captions.keys() & set(stems):
        alone = [captions[stem] for stem in sorted(captions.keys() - set(stems))]
        return [
            *(partial(_captioned_by_file, f, captions.get(s)) for f, s in zip(pictures, stems)),
            *(partial(_caption_alone, file) for file in alone),
        ]
    require(
        all(file.parent != folder for file in pictures),
        f"{folder} holds pictures without captions: put a .txt beside each, a metadata.jsonl or "
        "metadata.csv with file_name and text, or the pictures into a folder for each class",
    )
    classes = [file.relative_to(folder).parts[0] for file in pictures]
    numbered = all(re.fullmatch(r"n\d+", name) for name in classes)  # of WordNet
    require(not numbered, f"{folder} has numbered classes: give their names with --labels")
    return [
        partial(_captioned, str(file), [name], partial(open_image, file))
        for file, name in zip(pictures, classes)
    ]


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """The pictures and captions of a folder and those in it; on storage, without a request for each."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # such as ._cat.jpg of macOS, which is no picture
            continue
        if path.suffix.lower() in (*_PICTURES, ".txt"):
            yield path
        elif path.is_dir():
            yield from _walk(path)


def _captioned_by_file(file: epath.Path, caption: epath.Path | None) -> RawExample:
    if caption is None:
        raise BadExample("missing_file", f"{file} has no caption: there is no {file.stem}.txt")
    text = caption.read_bytes().decode("utf-8-sig", "surrogateescape")
    wordings = [line.strip() for line in unicode_text(text, f"the caption {caption}").split("\n")]
    if not any(wordings):
        raise BadExample("empty", f"{caption} is empty")
    return _captioned(str(file), [w for w in wordings if w], partial(open_image, file))


def _caption_alone(caption: epath.Path) -> RawExample:
    raise BadExample("missing_file", f"{caption} has no picture of that name beside it")


def _captioned(where: str, captions: Sequence[str], image: Callable) -> RawExample:
    return RawExample(where, [Prompt(tuple(captions)), RawImage(image, denoise=True)])


def _tfds(name: str, labels: Sequence[str]) -> Examples:
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


def _json_file(text: str, path: epath.Path, ignored: Sequence[str]) -> Examples:
    rows = _json_list(text, path) if path.suffix == ".json" else None
    if rows is not None:
        return [
            partial(read_row, row, path.parent, where, form, ignored)
            for number, row in enumerate(rows, 1)
            for where in [f"{path}:{number}"]
            for form in _check(row, where, ignored)
        ]
    # Unlike splitlines, which also splits at characters that may be part of a text of JSON.
    return [
        partial(_line, line, path.parent, where, form, ignored)
        for number, line in enumerate(text.split("\n"), 1)
        for where in [f"{path}:{number}"]
        if line.strip()
        for form in _check_line(line, where, ignored)
    ]


def _json_list(text: str, path: epath.Path) -> list | None:
    """The examples of a JSON file, or None if it holds JSON Lines, as many published .json files do."""
    if not text.lstrip().startswith("["):
        try:
            return [json.loads(text)]
        except ValueError:
            return None
    return _json(text, str(path))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadExample("json", f"{where} is not JSON (nested too deeply)") from error
    except ValueError as error:
        raise BadExample("json", f"{where} is not JSON ({error})") from error


def _line(line: str, folder: epath.Path, where: str, form, ignored: Sequence[str]) -> RawExample:
    return read_row(_json(line, where), folder, where, form, ignored)


def _check_line(line: str, where: str, ignored: Sequence[str]) -> list[str | None]:
    try:
        row = _json(line, where)
    except BadExample:  # raised again when the example is read
        return [None]
    return _check(row, where, ignored)


def _check(row: Any, where: str, ignored: Sequence[str]) -> list[str | None]:
    """The forms of a row; [None] if it has none, which is raised when it is read.

    Raises:
      InputError: a key that is not understood.
    """
    if not isinstance(row, dict):
        return [None]
    check_keys(row, where, ignored)
    try:
        return list(forms_of({k: v for k, v in row.items() if k not in ignored}, where))
    except InputError:
        return [None]


def _csv(text: str, path: epath.Path, ignored: Sequence[str]) -> Examples:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(_cells(rows, path), [])]
    require(any(header), f"{path} has no line with the names of its columns")
    twice = {name for name in header if header.count(name) > 1}
    require(not twice, f"{path}:1 names two columns {', '.join(sorted(twice))}")
    check_keys(dict.fromkeys(header, ""), f"{path}:1", ignored)
    examples: list[Callable[[], RawExample]] = []
    for cells in _cells(rows, path):
        where = f"{path}:{rows.line_num}"
        if len(cells) == len(header):
            row = {name: cell if cell.strip() else None for name, cell in zip(header, cells)}
            forms = _check(row, where, ignored)
            examples += [
                partial(read_row, row, path.parent, where, form, ignored) for form in forms
            ]
        elif cells:  # not an empty line
            examples.append(partial(_refuse_cells, where, len(cells), len(header)))
    return examples


def _cells(rows, path: epath.Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num} is not CSV ({error})") from error


def _refuse_cells(where: str, found: int, want: int) -> RawExample:
    raise BadExample("schema", f"{where} has {found} cells, but there are {want} columns")


def _parquet(path: epath.Path, ignored: Sequence[str]) -> Examples:
    table = _read_table(path)
    check_keys({field.name: _turn_keys(field.type) for field in table.schema}, str(path), ignored)
    # Which values of a row are there decides its forms; their bytes are not needed for that.
    there = {
        name: table.column(name).is_valid().to_pylist()
        for name in table.column_names
        if name not in ignored
    }
    return [
        partial(_table_row, path, number, form, ignored)
        for number in range(table.num_rows)
        for form in _check({n: True for n in there if there[n][number]}, str(path), ())
    ]


def _turn_keys(kind) -> list[dict[str, str]]:
    """The keys of the turns in a column of this type, as one turn; [] for another column."""
    fields = getattr(kind, "value_type", None)
    is_turn = fields is not None and fields.num_fields > 0
    return [{field.name: "" for field in fields}] if is_turn else []


def _table_row(path: epath.Path, number: int, form, ignored: Sequence[str]) -> RawExample:
    (row,) = _read_table(path).slice(number, 1).to_pylist()
    return read_row(row, path.parent, f"{path}, row {number + 1}", form, ignored)


@functools.lru_cache(maxsize=1)
def _read_table(path: epath.Path):
    """The table, read once in every process."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} needs pip install 'monoformer_jax[parquet]'") from error
    try:
        remote = "://" in str(path)
        return parquet.read_table(io.BytesIO(path.read_bytes()) if remote else str(path))
    except Exception as error:  # a damaged file raises many types
        raise InputError(f"{path} is not a Parquet file ({error})") from error
