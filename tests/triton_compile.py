"""Compiles the Triton kernels to cubins on a machine without a GPU.

`attention_gpu_test` runs this as a program, because one process cannot both compile and interpret.
Arguments: compute capability, dtype, head dims. Prints a JSON list of
[kernel, head dim, bytes of cubin, bytes spilled, shared memory].
"""

import json
import re
import subprocess
import sys
import tempfile

import jax
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from monoformer_jax.attention import gpu_kernel, gpu_triton

POINTERS = {"start": "*i32", "stop": "*i32", "bounds": "*i32", "lse": "*fp32", "delta": "*fp32"}
NAMES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def spilled(ptx: str, capability: int) -> int:
    """Bytes of register spill stores and loads that ptxas reports."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stdout + done.stderr)
    assert done.returncode == 0 and found, done.stderr
    return sum(map(int, found))


def build(name: str, tile: gpu_kernel.Tile, dtype: str, head_dim: int, capability: int) -> list:
    """Compiles one kernel at its default tile for rows of 4096 tokens."""
    kernel = getattr(gpu_triton, name)
    q = jax.ShapeDtypeStruct((4, 4096, 16, head_dim), dtype)
    k = jax.ShapeDtypeStruct((4, 4096, 4, head_dim), dtype)
    constants = gpu_kernel._Static(capability, None).constants(q, k, tile)
    assert isinstance(constants["DOT"], tl.dtype)
    signature = {
        a: "constexpr" if a in constants else POINTERS.get(a, NAMES[dtype])
        for a in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if a not in constants
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    # If a tile does not fit the tensor memory, Triton emits a program that traps at once.
    assert not re.search(r"\btrap;", compiled.asm["ptx"]), f"{name}: {tile} does not fit"
    spill = spilled(compiled.asm["ptx"], capability)
    return [name, head_dim, len(compiled.asm["cubin"]), spill, compiled.metadata.shared]


if __name__ == "__main__":
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    found = []
    for head_dim in map(int, sys.argv[3:]):
        tiles = gpu_kernel.choose_tiles(dtype, head_dim, capability)
        for name in ("forward", "dq", "dkv"):
            tile = getattr(tiles, name)
            found.append(build(f"{name}_kernel", tile, dtype, head_dim, capability))
    print(json.dumps(found))
