"""Runs cases of `attention_cases` through the Triton kernels in Triton's CPU interpreter.

`attention_gpu_test` runs this as a program, because TRITON_INTERPRET=1 must be set before triton is
imported and applies to the process. Prints one JSON object: the errors of each case.
"""

import functools
import json
import sys

import jax.numpy as jnp
import numpy as np
from attention_cases import CASES, errors
from copies_cases import attention_difference

from monoformer_jax.attention import gpu_kernel, gpu_triton
from monoformer_jax.attention.gpu_kernel import Tile, Tiles

# Small and unequal, to cover every loop and to detect a mix-up of the block sizes.
TILES = Tiles(Tile(128, 64, 4, 1), Tile(64, 128, 4, 1), Tile(64, 128, 4, 1))


class Tensor:
    """The part of torch.Tensor that the interpreter uses, around a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def new_empty(self, *_, **__) -> "Tensor":
        return Tensor(self.array)

    def set_(self, storage, *_) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, _) -> None:
        """Does nothing: the interpreter wrote into the array itself."""


def launch(static, name, arrays, outputs, grid, tile, constants):
    """Replaces `gpu_kernel._launch`; the arrays are values, because nothing is jitted here."""
    results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
    tensors = [Tensor(np.array(x)) for x in arrays] + [Tensor(x) for x in results]
    getattr(gpu_triton, name)[grid](*tensors, **constants)
    return [jnp.asarray(x) for x in results]


if __name__ == "__main__":
    gpu_kernel._launch = launch
    # The interpreter has no bfloat16 products; neither has a T4 (7.5), which takes the float32 path.
    run = functools.partial(gpu_kernel.gpu_attention, capability=75, tiles=TILES)
    # Not jitted: a callback of a jitted program can wait for ever for the threads that wait for it.
    found = {name: errors(CASES[name], run, jit=lambda f: f) for name in sys.argv[1:]}
    print(json.dumps(found | {"noised copies": attention_difference(run)}))
