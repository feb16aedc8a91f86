"""Reference rate for every benchmark: a large matrix product on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Mean time of a call after one warm-up call, blocking only after the last."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / repeats * 1e3


def native_dtype() -> str:
    """The benchmark's compute dtype: "float32" on CPU, "bfloat16" elsewhere."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def matmul_tflops(dtype: str, repeats: int) -> float:
    """Rate of a large matrix product in this dtype, in TFLOP/s."""
    size = 1024 if jax.devices()[0].platform == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / milliseconds(lambda: product(x, x), repeats) / 1e9
