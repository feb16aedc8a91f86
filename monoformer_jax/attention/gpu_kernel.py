"""Interval attention on NVIDIA GPUs: the differentiable operation around the Triton kernels.

The kernels are called through `jax_triton`, which needs JAX's CUDA plugin and is therefore imported
when the first call is traced. Both passes visit only the blocks inside the mask's block bounds. The
backward pass has two kernels, one for dq and one for dk and dv, so it needs no atomic adds.
"""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
from einops import rearrange

from monoformer_jax.attention.mask import IntervalMask, key_block_bounds, query_block_bounds
from monoformer_jax.attention.vjp import differentiable, natural_lse

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LOWEST_CAPABILITY = 75


@dataclasses.dataclass(frozen=True)
class Tile:
    """Query and key block sizes in tokens, `num_warps` and `num_stages` of a Triton program."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One tile for each of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By compute capability (the largest entry not above the device's) and head dim. Chosen so that the
# compiler spills no registers for the head dims 64 and 128; not timed on a device.
TILES = {
    80: {
        64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    90: {
        64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: Tiles(Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    },
    100: {
        64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 1)),
        256: Tiles(Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    },
}
# For float32 products, which run on the CUDA cores. Triton uses no tensor cores below compute
# capability 8.0, so there every dtype uses this table.
FLOAT32_TILES = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def product_dtype(dtype: jnp.dtype, capability: int) -> str:
    """Dtype of the matrix product operands: the input's, or float32 if Triton uses no tensor cores."""
    return "float32" if capability < 80 else jnp.dtype(dtype).name


def choose_tiles(dtype: jnp.dtype, head_dim: int, capability: int) -> Tiles:
    """Default tiles for a device of compute capability 10 · major + minor.

    Raises:
      ValueError: the device is too old, or has too little shared memory for this head dim.
    """
    if capability < LOWEST_CAPABILITY:
        raise ValueError(
            f"attention impl 'gpu': compute capability {capability / 10} is below "
            f"{LOWEST_CAPABILITY / 10}"
        )
    if capability < 80 and head_dim > 128:
        raise ValueError(
            f"attention impl 'gpu': the backward pass of head dim {head_dim} needs more than the 64 "
            f"KiB of shared memory of compute capability {capability / 10}; impl 'dense' can run it"
        )
    if product_dtype(dtype, capability) == "float32":
        return FLOAT32_TILES[head_dim]
    return TILES[max((c for c in TILES if c <= capability), default=80)][head_dim]


def _needed(module: str):
    """Imports a module of the extra [cuda].

    Raises:
      ValueError: the module is missing; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"attention impl 'gpu' needs {module}; install the extra [cuda]: {error}"
        ) from error


def _launch(
    static: _Static, name: str, arrays, outputs, grid, tile: Tile, constants: dict
) -> list[jax.Array]:
    """Calls a kernel of `gpu_triton` on a GPU through jax_triton."""
    return _needed("jax_triton").triton_call(
        *arrays,
        kernel=getattr(_needed("monoformer_jax.attention.gpu_triton"), name),
        out_shape=outputs,
        grid=grid,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # Otherwise jax_triton asks the driver, so lowering would fail on a machine without one.
        compute_capability=static.capability,
        name=f"interval_attention_{name}",
        **constants,
    )


@dataclasses.dataclass(frozen=True)
class _Static:
    capability: int
    tiles: Tiles

    def constants(self, q: jax.Array, k: jax.Array, tile: Tile) -> dict:
        """Compile-time constants of a kernel; see `gpu_triton` for their names."""
        tl = _needed("triton.language")
        (batch, length, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
        dot = getattr(tl, product_dtype(q.dtype, self.capability))
        return {
            "B": batch, "L": length, "S": keys, "N": heads, "K": kv_heads, "H": head_dim,
            "QB": tile.queries, "KB": tile.keys, "DOT": dot, "PRECISION": "ieee",
        }  # fmt: skip


def _bounds(mask: IntervalMask, tile: Tile):
    """Key block bounds of the query blocks; the padding queries of the last block see nothing."""
    extra = -mask.start.shape[1] % tile.queries
    ends = (jnp.pad(x, ((0, 0), (0, extra))) for x in (mask.start, mask.stop))
    return key_block_bounds(IntervalMask(*ends), tile.queries, tile.keys)


def _run_forward(static: _Static, q, k, v, mask):
    tile, (batch, length, heads, _) = static.tiles.forward, q.shape
    bounds = jnp.stack(_bounds(mask, tile))
    outputs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    out, lse = _launch(
        static, "forward_kernel", (q, k, v, mask.start, mask.stop, bounds), outputs,
        (bounds.shape[2], batch * heads, 1), tile, static.constants(q, k, tile),
    )  # fmt: skip
    return out, rearrange(natural_lse(lse), "B N L -> B L N"), lse


def _run_backward(static: _Static, q, k, v, mask, out, lse, dout, dlse):
    (batch, _, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse
    delta = rearrange(delta, "B L N -> B N L")

    tile = static.tiles.dq
    bounds = jnp.stack(_bounds(mask, tile))
    shared = (q, k, v, dout, mask.start, mask.stop)
    (dq,) = _launch(
        static, "dq_kernel", (*shared, bounds, lse, delta), [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        (bounds.shape[2], batch * heads, 1), tile, static.constants(q, k, tile),
    )  # fmt: skip

    tile = static.tiles.dkv
    key_blocks = -(-keys // tile.keys)
    bounds = jnp.stack(query_block_bounds(_bounds(mask, tile), key_blocks))
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    dk, dv = _launch(
        static, "dkv_kernel", (*shared, bounds, lse, delta), outputs,
        (key_blocks, batch * kv_heads, 1), tile, static.constants(q, k, tile),
    )  # fmt: skip
    return dq, dk, dv


_attention = differentiable(_run_forward, _run_backward)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernel does not support q [B, L, N, H] and k [B, S, K, H], or None."""
    if q.shape[3] not in HEAD_DIMS:
        return f"head dim {q.shape[3]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        return f"dtypes {q.dtype} and {k.dtype} are not both bfloat16, float16 or float32"
    return None


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask,
    *,
    capability: int,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over one key range per query; differentiable in both results.

    Args:
      q: [B, L, N, H]. k, v: [B, S, K, H] with N a multiple of K. bfloat16, float16 or float32.
      mask: ranges over the S keys.
      capability: compute capability of the device, 10 · major + minor.
      tiles: replace the default tiles.

    Returns:
      Output [B, L, N, H] in q's dtype and log-sum-exp float32 [B, L, N], as in `dense_attention`.

    Raises:
      ValueError: head dim, dtype or device that the kernels do not support.
    """
    if reason := unsupported(q, k):
        raise ValueError(f"attention impl 'gpu': {reason}")
    tiles = tiles or choose_tiles(q.dtype, q.shape[3], capability)
    return _attention(_Static(capability, tiles), q, k, v, mask)
