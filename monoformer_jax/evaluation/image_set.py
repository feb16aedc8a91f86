"""Sets of pictures that are measured: a folder of files, or a .npz in the format of ADM's evaluator.

FOLDER/               .png, .jpg, .jpeg and .webp, in the order of their names; not its subfolders
FILE.npz: arr_0       uint8 [n, height, width, 3], read in pieces: it may be larger than the memory
FILE.npz: mu, sigma   statistics of Inception features (mu_s, sigma_s: of the spatial ones)
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from monoformer_jax.data.image_io import open_image
from monoformer_jax.errors import InputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGES, _STATISTICS = "arr_0", ("mu", "sigma", "mu_s", "sigma_s")
_FACTS = ("extractor", "height", "width", "count")  # beside statistics that `evaluate` wrote
_MOST = 1 << 32  # bytes of an array of statistics


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Pictures of one size, or statistics of their features, or both.

    Attributes:
      source: the folder or file.
      files: the pictures of a folder; empty for a .npz.
      has_images: whether there are pictures.
      count, height, width: of the pictures; of statistics alone, of those behind them, or 0 if unknown.
      statistics: the arrays of a .npz that are not pictures.
      values: uint8 [n, height, width, 3] of pictures that are in memory.
    """

    source: epath.Path
    files: tuple[epath.Path, ...]
    has_images: bool
    count: int
    height: int
    width: int
    statistics: dict[str, Any]
    values: np.ndarray | None = None

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, 3], n at most `size`.

        Raises:
          InputError: a picture that cannot be read, or that has another size than the first one.
        """
        if self.values is not None:
            return (self.values[i : i + size] for i in range(0, self.count, size))
        return self._of_files(size) if self.files else self._of_array(size)

    def _of_files(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self.files), size):
            found = []
            for file in self.files[start : start + size]:
                picture = np.asarray(open_image(file))
                require(
                    picture.shape[:2] == (self.height, self.width),
                    f"{self.source} mixes sizes: {self.files[0].name} has {self.width}×{self.height} "
                    f"pixels, {file.name} has {picture.shape[1]}×{picture.shape[0]}",
                )
                found.append(picture)
            yield np.stack(found)

    def _of_array(self, size: int) -> Iterator[np.ndarray]:
        with _open_array(self.source, _IMAGES) as (shape, _, stream):
            each = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                rows = min(size, shape[0] - start)
                values = stream.read(rows * each)
                require(len(values) == rows * each, f"{self.source} is truncated")
                yield np.frombuffer(values, np.uint8).reshape(rows, *shape[1:])


def open_image_set(source: epath.Path) -> ImageSet:
    """Reads names, sizes and statistics; no picture but the first one of a folder.

    Raises:
      InputError: no such folder or file, none that is a picture, arrays of another kind.
    """
    if source.is_dir():
        files = tuple(sorted(x for x in source.iterdir() if x.suffix.lower() in SUFFIXES))
        require(bool(files), f"{source} has no pictures ({', '.join(SUFFIXES)})")
        height, width = np.asarray(open_image(files[0])).shape[:2]
        return ImageSet(source, files, True, len(files), height, width, {})
    require(source.exists(), f"there is no folder and no file {source}")
    require(source.suffix == ".npz", f"{source} is neither a folder of pictures nor a .npz file")
    try:
        with source.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{source} is damaged ({error})") from error
    found = {name: _load(source, name) for name in (*_STATISTICS, *_FACTS) if name in names}
    require(
        _IMAGES in names or {"mu", "sigma"} <= found.keys(),
        f"{source} has neither pictures (arr_0) nor statistics (mu, sigma): it has {', '.join(names)}",
    )
    if _IMAGES not in names:
        count, height, width = (int(found.get(name, 0)) for name in ("count", "height", "width"))
        return ImageSet(source, (), False, count, height, width, found)
    with _open_array(source, _IMAGES) as (shape, dtype, _):
        require(
            dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and min(shape) > 0,
            f"{source}: arr_0 is {dtype}{list(shape)}, not uint8 [n, height, width, 3]",
        )
    return ImageSet(source, (), True, *shape[:3], found)


def in_memory(values: np.ndarray, name: str) -> ImageSet:
    """A set of pictures, uint8 [n, height, width, 3]."""
    return ImageSet(epath.Path(name), (), True, *values.shape[:3], {}, values)


@contextlib.contextmanager
def _open_array(source: epath.Path, name: str) -> Iterator[tuple[tuple[int, ...], np.dtype, Any]]:
    """Shape, dtype, and the stream of the values of an array of a .npz."""
    try:
        with (
            source.open("rb") as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{name}.npy") as stream,
        ):
            version = np.lib.format.read_magic(stream)
            require(version in ((1, 0), (2, 0)), f"{source}: {name} has an unknown format")
            read = (np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0)
            shape, fortran, dtype = read[version[0] - 1](stream)
            require(
                not (fortran and len(shape) > 1) and not dtype.hasobject,
                f"{source}: {name} is not an array in C order",
            )
            yield shape, dtype, stream
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{source}: {name} is damaged ({error})") from error


def _load(source: epath.Path, name: str) -> Any:
    with _open_array(source, name) as (shape, dtype, stream):
        size = int(np.prod(shape)) * dtype.itemsize
        require(size <= _MOST, f"{source}: {name} has {size} bytes")
        values = np.frombuffer(stream.read(size), dtype)
        require(values.nbytes == size, f"{source} is truncated")
        return values.reshape(shape) if shape else values.reshape(()).item()
