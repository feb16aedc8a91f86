"""A cache of compiled programs in the user's cache folder, so that a second start does not compile.

MONOFORMER_COMPILE_CACHE=DIR moves it, and =off turns it off; a cache that JAX was given stays as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

VARIABLE = "MONOFORMER_COMPILE_CACHE"


def use_compile_cache() -> Path | None:
    """Turns the cache on for the programs of this process that are compiled from now on.

    Returns:
      Its folder; None if it is off, JAX has one already, or the folder cannot be written.
    """
    given = os.environ.get(VARIABLE)
    if given == "off" or jax.config.jax_compilation_cache_dir:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(given).expanduser() if given else cache / "monoformer_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
