"""Folders of recorded inputs and outputs of the original, with any names and sizes.

A folder has io.npz (keys CASE/NAME), config.json and weights.safetensors. Its config.json determines
the kind of model, and the arrays of a case determine what it can check.
tiny_b and tiny_c have random weights and cover the rest: patch sizes one and four, one key/value head,
other special tokens, a causal model with position embeddings at every layer, no learned sigma, shards
and a .bin (recorded with torch 2.13, transformers 4.38, CPU).
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import REFERENCE

from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.diffusion import ddpm
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.pretrained.folder import open_weights
from monoformer_jax.pretrained.table import open_tree, read_tree
from monoformer_jax.sampling.text import text_logits

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


FILES = ("config.json", "io.npz", "param_shapes.json")


def _kind(path):
    if not (path / "config.json").is_file():
        return "shapes" if (path / "param_shapes.json").is_file() else "diffusion"
    config = json.loads((path / "config.json").read_text())
    if "block_out_channels" in config:
        return "vae"
    if config["model_type"] in ("clip", "clip_vision_model"):
        return "clip"
    return "monoformer" if "decoder_t_embed" in config else "llama"


FOLDERS = [
    Folder(path, _kind(path))
    for path in sorted(ROOT_FOLDER.iterdir())
    if any((path / file).is_file() for file in FILES)
]

# Check -> kind of model, and the arrays that a case must have for it.
CHECKS = {
    "training": ("monoformer", ["lm_loss_raw", "total"]),
    "gradients": ("monoformer", ["gradnorm/model.norm.weight"]),
    "optimizer": ("monoformer", ["trace", "ema_decay"]),
    "mask": ("monoformer", ["allowed"]),
    "guidance": ("monoformer", ["z", "fw_x_out"]),
    "sampling": ("monoformer", ["z", "noise", "timestep_map", "final"]),
    "clipped sampling": ("monoformer", ["z", "noise", "timestep_map", "final_clip"]),
    "ddim": ("monoformer", ["z", "timestep_map", "ddim_final"]),
    "first step": ("monoformer", ["z", "noise", "sample_step0"]),
    "first clipped step": ("monoformer", ["z", "noise", "sample_clip_step0"]),
    "writing": ("monoformer", ["input_ids", "generated"]),
    "layers": ("llama", ["hidden_last", "logits"]),
    "continuation": ("llama", ["prompt", "sequences"]),
    "autoencoder": ("vae", ["image", "moments"]),
    "tower": ("clip", ["pixel_values", "features"]),
    "pixels": ("clip", ["pixel_values", "image_u8"]),
    "tables": ("diffusion", ["timestep_map"]),
    "losses": ("diffusion", ["model_output"]),
}


def cases(*checks):
    """pytest parameters (folder, case) of the cases with the arrays of one of the checks."""
    return [
        (folder, case)
        for folder in FOLDERS
        if folder.kind != "shapes"
        for case, arrays in folder.cases.items()
        if any(
            folder.kind == CHECKS[c][0] and all(n in arrays for n in CHECKS[c][1]) for c in checks
        )
    ]


def sections_of(timestep_map):
    """The respacing string for these steps, see `ddpm.spaced_steps`."""
    kept, count = np.asarray(timestep_map).tolist(), len(timestep_map)
    parts = [np.array_split(np.arange(ddpm.STEPS), n) for n in range(2, 11)]
    counts = [",".join(str(np.isin(part, kept).sum()) for part in split) for split in parts]
    for sections in (str(count), f"ddim{count}", *counts):
        try:
            if ddpm.spaced_steps(ddpm.STEPS, sections) == kept:
                return sections
        except InputError:  # it does not divide the chain
            continue
    raise AssertionError(f"no respacing keeps the steps {kept}")


def label(value):
    """Name of a parameter in the pytest report."""
    return value.path.name if isinstance(value, Folder) else value


def close(got, want, tolerance=2e-5):
    """Asserts that values are finite and the largest absolute error is within the tolerance."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    if want.size:
        error = np.abs(got - want).max()
        assert error <= tolerance, f"error {error:.2g} above {tolerance:.2g}"


def channels_last(x):
    return np.moveaxis(x, -3, -1)


def logits_of(model, hidden):
    """Logits of a bound MonoFormer, computed by the sampler's function."""
    return text_logits(model.config, {"text_head": model.text_head[...]}, hidden)


def output_of(model, hidden, image_ids, times):
    """The image head's prediction, with the variance concatenated if there is one."""
    prediction, variance = model.image_output(hidden, image_ids, times)
    return prediction if variance is None else jnp.concatenate([prediction, variance], -1)


def run(command, *arguments):
    """Runs a command's module in this process; returns its exit code."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args, args.overrides = parser.parse_known_args([str(x) for x in arguments])
    return command.main(args)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: (row["loss"], row["text_loss"]) for row in map(json.loads, lines)}


def random_params(config):
    """Random weights that sometimes emit <|im_start|> and </s>."""
    params = monoformer.init(config.model, jax.random.key(3))
    head = params["text_head"]
    for token in (ByteTokenizer().im_start_id, ByteTokenizer().eos_id):
        head = head.at[:, token].multiply(4.0)
    return params | {"text_head": head}


def drawn_params(c):
    """Random parameters, of which none has a special value, without compiling their initialization."""
    rng = np.random.default_rng(1)

    def draw(x):
        stddev = math.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.1
        return jnp.asarray(stddev * rng.normal(size=x.shape) + (x.ndim == 1), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0))))
