"""Outputs: checked before the work, written atomically, and never over a file of someone else."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from monoformer_jax.errors import InputError, require

MOST_JSON = 1 << 26  # bytes; an index of 100,000 tensors has 10 MB
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # kinds of storage, and what reads and writes them


def expand(path: epath.PathLike) -> epath.Path:
    """A path on this machine, with ~ expanded, or on storage such as gs://bucket/run.

    Raises:
      InputError: not a path, an unknown kind of storage, or a missing package for it.
    """
    require(isinstance(path, str | os.PathLike), f"{path!r} is not a path")
    text = os.path.expanduser(os.fspath(path))
    require(bool(text) and "\0" not in text, f"{text!r} is not a path")
    if scheme := re.match(r"(\w+):/", text):
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        require(
            scheme[1] in _PACKAGES and "://" in text,
            f"{text} is a path neither on this machine nor on {known}",
        )
        try:
            import fsspec

            fsspec.get_filesystem_class(scheme[1])
        except ImportError as error:
            package = _PACKAGES[scheme[1]]
            raise InputError(f"{text} needs a package: pip install {package}") from error
    return epath.Path(text)


@contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path`, renamed to `path` if the block ends without an error.

    Works on local disks and on storage such as gs://. The temporary name contains the process id, so
    that concurrent writers do not collide.
    """
    path = epath.Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield staging
        if "://" not in str(path):  # otherwise a loss of power could leave an empty file
            with open(staging, "rb") as file:
                os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to `path` if the block ends without an error.

    Raises:
      InputError: `path` already exists, or cannot be written: disk full or no permission.
    """
    require(not path.exists(), f"{path} already exists; nothing was changed")
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        staging.chmod(0o755)  # mkdtemp creates it with 0o700
        yield staging
        staging.rename(path)
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({error}); no partial output is left"
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def check_output(path: epath.PathLike, option: str, ours: Callable[[epath.Path], bool]) -> None:
    """Raises InputError unless a file can be written at `path`; leaves nothing behind.

    Args:
      option: the flag that gave the path, for the message.
      ours: whether an existing file was written by the same command, and may be replaced.
    """
    path = epath.Path(path)
    require(not path.is_dir(), f"{option}={path} is a folder: give the name of a file")
    require(
        not path.exists() or (path.is_file() and ours(path)),
        f"{option}={path} exists, and this command did not write it: give another name",
    )
    check_writable(path.parent, option)


def check_writable(folder: epath.PathLike, option: str) -> None:
    """Raises InputError unless files can be written to an existing folder; leaves nothing behind."""
    folder = epath.Path(folder)
    if "://" not in os.fspath(folder):  # storage has no folders
        require(folder.is_dir(), f"{option}: there is no folder {folder}")
    probe = folder / f".monoformer.{os.getpid()}.new"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{option}: files cannot be written to {folder} ({error.strerror or error})"
        ) from error


def json_with(*keys: str) -> Callable[[epath.Path], bool]:
    """A predicate of files, for `check_output`: a JSON object with these keys."""

    def ours(path: epath.Path) -> bool:
        try:
            values = read_json(path)
        except InputError:
            return False
        return isinstance(values, dict) and values.keys() >= set(keys)

    return ours


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file of up to `MOST_JSON` bytes.

    Raises:
      InputError: no such file, a larger one, or one that is not JSON in UTF-8.
    """
    path = epath.Path(path)
    require(path.exists() and not path.is_dir(), f"there is no file {path}")
    size = path.stat().length
    require(size <= MOST_JSON, f"{path} has {size} bytes: a JSON file has at most {MOST_JSON}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise InputError(f"{path} is not valid JSON (nested too deeply)") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def write_json(path: epath.PathLike, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
