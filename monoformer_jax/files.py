"""Atomic writes of files and folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from monoformer_jax.errors import InputError, require


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
