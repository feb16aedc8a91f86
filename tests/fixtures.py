"""Folders of recorded inputs and outputs of the original, whatever their names and sizes.

A folder holds io.npz (keys CASE/NAME), config.json and weights.safetensors. What kind of model it is
stands in its config.json, and what a case can check is told by the arrays that it holds.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
from conftest import REFERENCE

from monoformer_jax.pretrained.folder import open_weights
from monoformer_jax.pretrained.table import open_tree, read_tree

ROOT_FOLDER = Path(os.environ.get("MONOFORMER_FIXTURES", REFERENCE))


@dataclasses.dataclass(frozen=True)
class Folder:
    path: Path
    kind: str  # "monoformer", "llama", "vae", "clip", "shapes" or "diffusion"

    @functools.cached_property
    def config(self):
        return json.loads((self.path / "config.json").read_text())

    @functools.cached_property
    def cases(self):
        """{case: {name: array}}; names may hold slashes."""
        found = {}
        with np.load(self.path / "io.npz") as recorded:
            for key in recorded.files:
                case, name = key.split("/", 1)
                found.setdefault(case, {})[name] = recorded[key]
        return found

    def params(self, table, target, ignored=""):
        tensors = open_weights(self.path)
        return read_tree(open_tree(table, tensors, target, ignored=ignored, source=str(self.path)))


def _kind(path):
    if not (path / "config.json").is_file():
        return "shapes" if (path / "param_shapes.json").is_file() else "diffusion"
    config = json.loads((path / "config.json").read_text())
    if "block_out_channels" in config:
        return "vae"
    if config["model_type"] == "clip_vision_model":
        return "clip"
    return "monoformer" if "decoder_t_embed" in config else "llama"


FOLDERS = [Folder(path, _kind(path)) for path in sorted(ROOT_FOLDER.iterdir()) if path.is_dir()]


def cases(kind, *names):
    """pytest parameters (folder, case) of every case of the kind that holds arrays of these names."""
    return [
        (folder, case)
        for folder in FOLDERS
        if folder.kind == kind
        for case, arrays in folder.cases.items()
        if all(name in arrays for name in names)
    ]


def label(value):
    """Name of a parameter in pytest's report."""
    return value.path.name if isinstance(value, Folder) else value


def close(got, want, tolerance=2e-5):
    """Largest absolute error within the tolerance, and nothing that is no number."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    if want.size:
        error = np.abs(got - want).max()
        assert error <= tolerance, f"error {error:.2g} above {tolerance:.2g}"


def channels_last(x):
    return np.moveaxis(x, -3, -1)
