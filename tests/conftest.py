"""Shared test setup: CPU only, four virtual devices, and the tiny digits config."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests, in several processes, compile the same programs, so they share a compilation cache. The
# first process creates the folder, and subprocesses inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="jax_cache_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
# Tiny programs take longer to compile than to run: this halves the time of the tests.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import dataclasses
from pathlib import Path

import jax
import pytest

from monoformer_jax.cli import load_config

if "JAX_NUM_CPU_DEVICES" not in os.environ:  # not inherited by subprocesses
    jax.config.update("jax_num_cpu_devices", 4)
# The newer CPU fusion emitters take twice as long to compile. The flag is read once, when the backend
# starts; it is then removed, since libtpu rejects it and subprocesses should not inherit it.
os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
jax.devices()
del os.environ["XLA_FLAGS"]

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "data" / "reference"  # recorded outputs of the original


@pytest.fixture(scope="session")
def config():
    """The tiny digits model."""
    return load_config(str(ROOT / "configs" / "digits.py:tiny"), [])


@pytest.fixture
def change(config):
    """config with some keys changed: change(steps=3, optimizer={"grad_accum_steps": 2})."""

    def changed(**groups):
        made = {}
        for name, value in groups.items():
            old = getattr(config, name)
            made[name] = dataclasses.replace(old, **value) if isinstance(value, dict) else value
        return dataclasses.replace(config, **made)

    return changed


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with the files that a wheel of this checkout installs."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)],
                   cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    return folder
