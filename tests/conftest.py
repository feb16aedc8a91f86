"""Shared by the tests: CPU only, four virtual devices, and the tiny digits config."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
from pathlib import Path

import jax
import pytest

from monoformer_jax.cli import load_config

jax.config.update("jax_num_cpu_devices", 4)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def config():
    """The tiny digits model on one device."""
    overrides = ["--config.mesh.data=1"]
    return load_config(str(ROOT / "configs" / "digits.py:tiny"), overrides)


@pytest.fixture
def change(config):
    """config with some keys changed: change(steps=3, optimizer={"accumulation": 2})."""

    def changed(**groups):
        made = {}
        for name, value in groups.items():
            old = getattr(config, name)
            made[name] = dataclasses.replace(old, **value) if isinstance(value, dict) else value
        return dataclasses.replace(config, **made)

    return changed
