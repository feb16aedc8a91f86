"""Checksums of a checkpoint's files, written when the checkpoint is committed.

STEP/checksums.json     {path: [size in bytes, checksum]} of every file that a restore reads

A checksum is the CRC-32 of the file. For objects on gs:// it is the CRC32C that the storage keeps for
each of them, so that terabytes are not read to be checked. Orbax's own formats do not cover the arrays:
OCDBT has a checksum for its index alone, and the codecs of its arrays cannot be configured.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec
import orbax.checkpoint as ocp
from etils import epath

_NAME = "checksums.json"
# Written when orbax commits: times, and the mark of a complete save. No restore reads them.
_UNCHECKED = (_NAME, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 2**22  # bytes
# Status codes of storage and device errors, which do not mean that the checkpoint is damaged.
_NOT_DAMAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED",
               "RESOURCE_EXHAUSTED")  # fmt: skip


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says what is wrong with it."""


def write_checksums(folder: epath.Path) -> None:
    """Writes checksums.json of a checkpoint."""
    files = {name: path for name, path in _files(folder) if name not in _UNCHECKED}
    sums = dict(zip(files, _parallel(_checksum, files.values())))
    (folder / _NAME).write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def find_damage(
    folder: epath.Path, parts: Sequence[str] = (), share: tuple[int, int] = (0, 1)
) -> str:
    """Compares the files of a checkpoint with their checksums.

    Args:
      folder: folder of one step.
      parts: subfolders to check; none: all files.
      share: (index, count): only this share of the files is read, as every process reads its own.

    Returns:
      What is wrong with the first damaged file; "" if nothing is.
    """
    if not (folder / _NAME).exists():
        return f"{_NAME} is missing"
    try:
        sums = json.loads((folder / _NAME).read_bytes())
        largest_first = sorted(sums, key=lambda name: -sums[name][0])
    except (ValueError, TypeError, LookupError):
        return f"{_NAME} is damaged"
    names = [n for n in largest_first if not parts or n.partition("/")[0] in parts]
    names = names[share[0] :: share[1]]
    found = _parallel(lambda name: _difference(folder / name, sums[name]), names)
    return next((f"{name} {problem}" for name, problem in zip(names, found) if problem), "")


def verify_files(
    folder: epath.Path, parts: Sequence[str] = (), share: tuple[int, int] = (0, 1)
) -> None:
    """Raises Damaged, see `find_damage`."""
    if damage := find_damage(folder, parts, share):
        raise Damaged(damage)


def _difference(path: epath.Path, expected: list) -> str:
    try:
        size, checksum = _checksum(path)
    except FileNotFoundError:
        return "is missing"
    if size != expected[0]:
        return f"has {size} bytes instead of {expected[0]}"
    return "" if checksum == expected[1] else "differs from its checksum"


def _checksum(path: epath.Path) -> list:
    """[size, checksum] of a file or object."""
    if "://" in str(path):
        fs, name = fsspec.core.url_to_fs(str(path))
        info = fs.info(name)
        if info.get("crc32c"):
            return [info["size"], info["crc32c"]]
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def _parallel(function, values) -> list:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 releases the GIL
        return list(pool.map(function, values))


def find_problem(read: Callable[..., None], *args) -> str:
    """Why `read(*args)` fails, if the checkpoint is the cause; "" if it succeeds."""
    try:
        read(*args)
    except Exception as error:  # damaged files raise errors of many types
        if not is_damage(error):
            raise
        return explain(error)
    return ""


def is_damage(error: Exception) -> bool:
    """Whether the checkpoint itself caused a read error, rather than the machine or the network."""
    external = MemoryError | PermissionError | ConnectionError | TimeoutError
    return not isinstance(error, external) and not any(w in str(error) for w in _NOT_DAMAGE)


def explain(error: Exception) -> str:
    """The error in one line, for a message."""
    text = (str(error).strip() or "no message").split("\n")[0][:200]
    return text if isinstance(error, Damaged) else f"{type(error).__name__}: {text}"


def commit_class(folder: epath.Path) -> type:
    """Orbax's class of a save in progress, which also writes the checksums just before its commit."""

    class Verified(ocp.path.atomicity_defaults.get_default_temporary_path_class(folder)):
        async def finalize(self):
            if self.get_final().name.isdigit():  # a step, not one of its parts
                write_checksums(self.get())
            await super().finalize()

    return Verified
