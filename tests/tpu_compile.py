"""Compiles attention ahead of time for TPU topologies through libtpu, without a TPU.

`attention_compile_test` runs this as a program, so that no other test's process loads libtpu.
Arguments: topology, then cases "B,L,K,G,H,dtype,pass"; the pass is "forward", "both", or "union", both
passes of a union of two masks. Prints a JSON list with, for each compiled
program, bytes of temporaries, copies of arrays as large as q or k, and number of kernels.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp

from monoformer_jax.attention import IntervalMask, interval_attention
from monoformer_jax.planning.hardware import abstract, one_chip


def layer(head_dim: int):
    """Projections, attention and the output projection, with nothing in between."""

    def run(x, wq, wk, wv, wo, *ends):
        heads = [(x @ w).reshape(*x.shape[:2], -1, head_dim) for w in (wq, wk, wv)]
        masks = tuple(IntervalMask(*ends[i : i + 2]) for i in range(0, len(ends), 2))
        out = interval_attention(*heads, masks, impl="tpu")
        return out.reshape(*x.shape[:2], -1) @ wo

    return run


def copies(text: str, sizes: tuple[int, ...]) -> dict[str, list[str]]:
    """Standalone copies of arrays of these sizes; copies inside a fusion cost nothing extra.

    Returns:
      "relayout": copies that change the dimension order; "retile": copies that keep it and only
      change the tiling.
    """
    layouts = dict(re.findall(r"(%[\w.-]+) = \w+\[[\d,]*\]\{([\d,]+)", text))
    found = {"relayout": [], "retile": []}
    for computation in re.split(r"\n(?=[%E]\S)", text):
        if re.match(r"%\w*fus", computation):
            continue
        found["relayout"] += re.findall(r"fusion\(.*calls=%copy_fusion\S*", computation)
        pattern = r"= (?:bf16|f32)\[([\d,]+)\]\{([\d,]+)\S* (copy|transpose)\((%[\w.-]+)"
        for one in re.finditer(pattern, computation):
            shape, layout, kind, operand = one.groups()
            if math.prod(map(int, shape.split(","))) in sizes:
                same = kind == "copy" and layouts.get(operand) == layout
                found["retile" if same else "relayout"].append(one[0])
    return found


def compile_case(topology: str, case: str) -> dict:
    """Compiles one case; see the module docstring."""
    batch, length, kv_heads, groups, head_dim = map(int, case.split(",")[:5])
    dtype, direction = case.split(",")[5:]
    mesh = one_chip(topology)
    width, kv_width = kv_heads * groups * head_dim, kv_heads * head_dim
    embed = 384  # so that no weight has the size of q or k
    shapes = [(batch, length, embed), (embed, width), (embed, kv_width), (embed, kv_width)]
    arguments = [abstract(mesh, shape, dtype) for shape in [*shapes, (width, embed)]]
    arguments += [abstract(mesh, (batch, length), jnp.int32)] * (4 if direction == "union" else 2)
    run = layer(head_dim)
    if direction != "forward":

        def loss(*arguments):
            return (run(*arguments).astype(jnp.float32) ** 2).sum()

        function = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    else:
        function = run
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    sizes = (batch * length * width, batch * length * kv_width)
    return {
        "case": case,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "copies": copies(text, sizes),
        "calls": len(re.findall(r"custom-call\(.*interval_attention_(?:forward|backward)", text)),
        "kernels": len(set(re.findall(r"interval_attention_(?:forward|backward|delta)", text))),
    }


if __name__ == "__main__":
    print(json.dumps([compile_case(sys.argv[1], case) for case in sys.argv[2:]]))
