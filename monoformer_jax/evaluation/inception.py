"""The InceptionV3 of FID: pictures to the features of the field's scores.

    uint8 [B, h, w, 3] ─ resize ─> [B, 299, 299, 3] ─> pool    [B, 2048]   FID, KID, precision, recall
                                                       spatial [B, 2023]   sFID
                                                       logits  [B, 1008]   Inception Score

It is the TensorFlow graph of 2015-12-05 (Szegedy et al., 1512.00567), which differs from torchvision's:
1,008 classes, averages that leave out the padding, and a maximum in place of the last average. The
weights are those of the PyTorch file that pytorch-fid and torch-fidelity download,
pt_inception-2015-12-05-6726825d.pth; the layers here have its names.

Scores of one set differ by how pictures are resized to 299 pixels, so the resize is part of the name:

    adm           bilinear as in TensorFlow 1, no half-pixel centers: ADM's evaluator, torch-fidelity
    pytorch_fid   bilinear with half-pixel centers
    clean_fid     bicubic with antialiasing, by PIL in float32 (Parmar et al., 2104.11222)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import require
from monoformer_jax.nn.layers import full_precision
from monoformer_jax.parallel import make_mesh, padded_rows, spread_batch
from monoformer_jax.pretrained.folder import open_safetensors
from monoformer_jax.pretrained.table import Entry, by_path, open_tree, read_tree, transpose
from monoformer_jax.pretrained.torch_file import open_torch_file

RESIZES = ("adm", "pytorch_fid", "clean_fid")
SIDE = 299
_CLASSES, _POOL, _SPATIAL = 1008, 2048, 7  # the spatial features are the first channels
_EPS = 1e-3  # of the batch norms
_IGNORED = r"fc\.bias|.*\.num_batches_tracked"  # the Inception Score of ADM leaves out the bias
_PARTS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}

# A block is branches side by side, a branch its steps: a pooling, or convolutions (name, width, size)
# or (name, width, size, stride); steps in a list are side by side, too.


def _block_a(pool: int) -> list:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pool, 1)],
    ]


def _block_b() -> list:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    ]


def _block_c(width: int) -> list:
    sizes = [1, (7, 1), (1, 7), (7, 1), (1, 7)]
    widths = [width] * 4 + [192]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [(f"branch7x7dbl_{i + 1}", widths[i], sizes[i]) for i in range(5)],
        ["average", ("branch_pool", 192, 1)],
    ]


def _block_d() -> list:
    return [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
         ("branch7x7x3_4", 192, 3, 2)],
        ["halve"],
    ]  # fmt: skip


def _block_e(pooling: str) -> list:
    def crossed(name):
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), crossed("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), crossed("branch3x3dbl_3")],
        [pooling, ("branch_pool", 192, 1)],
    ]


_BLOCKS = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(), "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("maximum"),
}  # fmt: skip


class Conv(nnx.Module):
    """Convolution without bias, batch norm of inference, ReLU; strides above 1 do not pad."""

    def __init__(self, c_in: int, width: int, size, stride: int = 1, padding: str = "SAME"):
        size = size if isinstance(size, tuple) else (size, size)
        self.kernel = nnx.Param(jnp.zeros((*size, c_in, width)))
        self.scale, self.bias, self.mean = (nnx.Param(jnp.zeros(width)) for _ in range(3))
        self.variance = nnx.Param(jnp.ones(width))
        self.stride, self.padding = stride, padding if stride == 1 else "VALID"

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPS)
        return jax.nn.relu(y * scale + (self.bias[...] - self.mean[...] * scale))


def _pool(x: jax.Array, kind: str) -> jax.Array:
    """Pools 3×3 windows: "average" and "maximum" keep the size, "halve" is a maximum with stride 2."""
    if kind == "halve":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    start, merge = (0.0, jax.lax.add) if kind == "average" else (-jnp.inf, jax.lax.max)
    y = jax.lax.reduce_window(x, start, merge, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    if kind == "maximum":
        return y
    inside = [np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]]
    return y / np.outer(*inside).astype(np.float32)[..., None]


class Block(nnx.Module):
    def __init__(self, c_in: int, branches: list):
        self.width = 0
        self.names = []
        for branch in branches:
            width, names = c_in, []
            for step in branch:
                many = step if isinstance(step, list) else [step]
                if isinstance(step, str):
                    names.append(step)
                    continue
                for name, out, *form in many:
                    setattr(self, name, Conv(width, out, *form))
                width = sum(one[1] for one in many)
                names.append(tuple(one[0] for one in many))
            self.names.append(tuple(names))
            self.width += width
        self.names = tuple(self.names)

    def __call__(self, x: jax.Array) -> jax.Array:
        found = []
        for branch in self.names:
            y = x
            for step in branch:
                if isinstance(step, str):
                    y = _pool(y, step)
                else:
                    y = jnp.concatenate([getattr(self, name)(y) for name in step], -1)
            found.append(y)
        return jnp.concatenate(found, -1)


class InceptionV3(nnx.Module):
    """[B, 299, 299, 3] in [-1, 1] -> the features of the top of this file, float32."""

    def __init__(self):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="VALID")
        width = 192
        for name, branches in _BLOCKS.items():
            setattr(self, name, Block(width, branches))
            width = getattr(self, name).width
        self.fc = nnx.Param(jnp.zeros((_POOL, _CLASSES)))

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_pool(x, "halve")))
        x = _pool(x, "halve")
        for name in _BLOCKS:
            if name == "Mixed_6d":  # mixed_6/conv of the TensorFlow graph
                spatial = self.Mixed_6d.branch1x1(x)[..., :_SPATIAL]
            x = getattr(self, name)(x)
        pool = x.mean((1, 2))
        spatial = rearrange(spatial, "B h w C -> B (h w C)")
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc[...]}


def _shapes() -> dict:
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(InceptionV3(), nnx.Param)))


def table() -> list[Entry]:
    """An entry for every parameter; the names are those of torchvision's inception_v3."""
    entries = []
    for path in by_path(_shapes()):
        *layer, part = path.split("/")
        name = ".".join(layer)
        if path == "fc":
            entries.append(Entry(path, "fc.weight", transpose, transpose))
        elif part == "kernel":
            entries.append(Entry(path, f"{name}.conv.weight", _to_ours, _to_theirs))
        else:
            entries.append(Entry(path, f"{name}.bn.{_PARTS[part]}"))
    return entries


def _to_ours(x):
    return rearrange(x, "o i h w -> h w i o")


def _to_theirs(x):
    return rearrange(x, "h w i o -> o i h w")


def load(file: Path) -> dict:
    """The parameters in a file of PyTorch (.pth, .pt, .bin) or safetensors.

    Raises:
      InputError: no such file, or tensors of another network, such as torchvision's.
    """
    require(file.is_file(), f"there is no file {file}")
    reader = open_safetensors if file.suffix == ".safetensors" else open_torch_file
    return read_tree(
        open_tree(table(), reader(file), _shapes(), ignored=_IGNORED, source=str(file))
    )


def resize(images: np.ndarray | jax.Array, kind: str) -> jax.Array:
    """uint8 [B, h, w, 3] to float32 [B, 299, 299, 3] in [-1, 1], as the pipeline `kind` does."""
    if kind == "clean_fid":
        x = jnp.asarray(np.stack([_bicubic(image) for image in np.asarray(images)]))
    else:
        centers = 0.5 if kind == "pytorch_fid" else 0.0
        x = _bilinear(_bilinear(jnp.asarray(images, jnp.float32), 2, centers), 1, centers)
    return x / 127.5 - 1 if kind == "pytorch_fid" else (x - 128) / 128


def _bilinear(x: jax.Array, axis: int, center: float) -> jax.Array:
    size = x.shape[axis]
    places = (np.arange(SIDE) + np.float32(center)) * np.float32(size / SIDE) - np.float32(center)
    places = np.clip(places.astype(np.float32), 0, size - 1)
    low = places.astype(int)
    far = (places - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    a, b = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
    return a + (b - a) * far


def _bicubic(image: np.ndarray) -> np.ndarray:
    channels = [PIL.Image.fromarray(x.astype(np.float32)) for x in np.moveaxis(image, -1, 0)]
    resized = [x.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC) for x in channels]
    return np.stack([np.asarray(x) for x in resized], -1).clip(0, 255)


class Inception:
    """The features of pictures, on all devices of this process.

    Attributes:
      name: network, weights and resize, which every score needs beside it.
      dims: number of the features that have statistics.
    """

    batch = 64

    def __init__(self, weights: Path, resize_as: str = RESIZES[0]):
        """Args:
        weights: file of the weights, see `load`.
        resize_as: one of `RESIZES`.

        Raises:
          InputError: see `load`.
        """
        self._mesh = make_mesh(MeshConfig(), jax.local_devices())
        self._params = jax.device_put(load(weights), NamedSharding(self._mesh, PartitionSpec()))
        self.dims = {"pool": _POOL, "spatial": 17 * 17 * _SPATIAL}
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
        self.resize, self.name = resize_as, f"InceptionV3 {digest}, resize {resize_as}"
        on_device = resize_as != "clean_fid"
        graph = nnx.graphdef(nnx.eval_shape(InceptionV3))

        @jax.jit
        def features(params, x):
            with full_precision(jnp.float32):
                return nnx.merge(graph, params)(resize(x, resize_as) if on_device else x)

        self._features = features

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, h, w, 3] to "pool" [n, 2048], "spatial" [n, 2023] and "logits" [n, 1008]."""
        x = images if self.resize != "clean_fid" else np.asarray(resize(images, self.resize))
        missing = padded_rows(len(x), self._mesh) - len(x)  # the last batch is another program
        x = np.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0)))
        found = self._features(self._params, spread_batch(x, self._mesh))
        return {name: np.asarray(values)[: len(images)] for name, values in found.items()}
