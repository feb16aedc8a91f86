"""Files that `sample` writes: pictures, the record of how they were made, and arrays.

    --out=FILE.png    one grid                     the record is FILE.json
    --out=FOLDER/     a file for each picture      the record is FOLDER/samples.json

A file of that name is replaced only if `sample` wrote it, which its metadata say; so do those of the
pictures that `evaluate` writes.
"""

from __future__ import annotations

import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.data.image_io import image_grid, to_pil, to_uint8
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import (
    atomic_write,
    check_output,
    check_writable,
    expand,
    read_json,
    write_json,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_WRITER = "monoformer_jax sample"
_SOFTWARE = 0x131  # the EXIF tag "Software"
_NUMBERED = re.compile(r"\d{5}\.png")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the results of one call of `sample` go.

    Attributes:
      pictures: a file for one grid, or a folder.
      grid: whether `pictures` is a file.
      record: file of the record.
      arrays: .npz file of all pictures; None: not written.
    """

    pictures: epath.Path
    grid: bool
    record: epath.Path
    arrays: epath.Path | None

    @classmethod
    def open(cls, out: str, record: epath.Path | None, arrays: epath.Path | None) -> Outputs:
        """Checks all outputs before the work; changes nothing.

        Args:
          out: the flag --out.
          record: the flag --json; None: beside the pictures.
          arrays: the flag --npz.

        Raises:
          InputError: an unknown file type, no such folder, a folder without permission, or a file
            that `sample` did not write.
        """
        path = expand(out)
        grid = not (out.endswith("/") or path.is_dir())
        if grid:
            require(
                path.suffix.lower() in SUFFIXES,
                f"--out={out}: end it in {', '.join(SUFFIXES)} for one grid of all pictures, or in / "
                "for a folder with a file for each",
            )
            check_output(path, "--out", pictures_of(_WRITER))
        else:
            _check_folder(path)
        beside = path.with_suffix(".json") if grid else path / "samples.json"
        if grid or path.is_dir() or record:
            check_output(record or beside, "--json" if record else "--out", _is_our_record)
        if arrays is not None:
            require(arrays.suffix == ".npz", f"--npz={arrays} must end in .npz")
            check_output(arrays, "--npz", _are_our_arrays)
        return cls(path, grid, record or beside, arrays)

    def write(self, pictures: Sequence[np.ndarray], columns: int) -> None:
        """Writes the pictures, float [h, w, C] of one size in [-1, 1]; `columns` is for a grid."""
        if self.grid:
            write_picture(self.pictures, image_grid(pictures, columns))
        else:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures, 1):
                write_picture(self.pictures / f"{number:05}.png", to_pil(picture))
        if self.arrays is not None:
            _write_arrays(self.arrays, to_rgb(np.stack(pictures)))

    def write_record(self, facts: dict[str, Any]) -> None:
        write_json(self.record, {"written_by": _WRITER, **facts})


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] to uint8 [..., 3], the format of ADM's evaluator."""
    pixels = to_uint8(images)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def _write_arrays(path: epath.Path, images: np.ndarray) -> None:
    """Writes images as arr_0 of a .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, images)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _WRITER.encode()
    with atomic_write(path) as file:
        file.write_bytes(buffer.getvalue())


def _check_folder(path: epath.Path) -> None:
    require(not path.is_file(), f"--out={path}/ is a file, not a folder")
    if path.is_dir():
        check_writable(path, "--out")
        for file in path.iterdir():
            if _NUMBERED.fullmatch(file.name):
                check_output(file, "--out", pictures_of(_WRITER))
    elif "://" not in str(path):
        check_writable(next(parent for parent in path.parents if parent.exists()), "--out")


def write_picture(path: epath.Path, picture: PIL.Image.Image, writer: str = _WRITER) -> None:
    """Writes a picture atomically, with the name of the command in its metadata."""
    buffer, exif = io.BytesIO(), PIL.Image.Exif()
    exif[_SOFTWARE] = writer
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    picture.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    with atomic_write(path) as file:
        file.write_bytes(buffer.getvalue())


def pictures_of(writer: str) -> Callable[[epath.Path], bool]:
    """A predicate of files, for `check_output`: pictures that this command wrote."""

    def ours(path: epath.Path) -> bool:
        try:
            with path.open("rb") as file, PIL.Image.open(file) as picture:
                return picture.getexif().get(_SOFTWARE) == writer
        except Exception:  # decoders raise many types; whatever it is, it is not ours
            return False

    return ours


def _is_our_record(path: epath.Path) -> bool:
    try:
        return read_json(path)["written_by"] == _WRITER
    except (InputError, KeyError, TypeError):
        return False


def _are_our_arrays(path: epath.Path) -> bool:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.comment == _WRITER.encode()
    except (OSError, zipfile.BadZipFile):
        return False
