"""Files and folders that appear whole or not at all."""

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
    """A path beside `path` to write to; it gets its name when the block ends without an error.

    Works on local disks and on storage such as gs://. Writers of the same file are kept apart by their
    process ids.
    """
    path = epath.Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which gets its name when the block ends without an error.

    Raises:
      InputError: it exists already, or cannot be written: the disk is full, or no permission.
    """
    require(not path.exists(), f"{path} exists already; nothing was touched")
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        staging.chmod(0o755)  # mkdtemp's own is private
        yield staging
        staging.rename(path)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error}); nothing is left of it") from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
