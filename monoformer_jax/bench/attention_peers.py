"""Other implementations that can compute the same attention, where they are installed.

Each factory takes the mask of the rows (host arrays) and returns a function (q, k, v) -> output
[B, L, N, H], or raises `Missing` with the reason. Inputs besides q, k and v (a dense mask, block
tables) are created here, before timing starts, which favours the other implementations.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask, dense_attention, dense_mask, interval_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Missing(Exception):
    """The implementation cannot run on this machine; the message gives the reason."""


def platform() -> str:
    """The JAX platform: "cpu", "tpu" or "gpu"."""
    return {"cuda": "gpu"}.get(jax.devices()[0].platform, jax.devices()[0].platform)


def ours(mask: IntervalMask) -> Attention:
    """The interval attention kernel of this platform."""
    if platform() == "cpu":
        raise Missing("there is no CPU kernel; the library uses dense attention on CPU")
    mask = jax.tree.map(jnp.asarray, mask)
    return lambda q, k, v: interval_attention(q, k, v, mask, impl=platform())


def dense(mask: IntervalMask) -> Attention:
    """This library's dense attention, in plain JAX without a kernel."""
    mask = jax.tree.map(jnp.asarray, mask)
    return lambda q, k, v: dense_attention(q, k, v, mask)[0]


def jax_nn(mask: IntervalMask, implementation: str) -> Attention:
    """`jax.nn.dot_product_attention` with the dense mask."""
    if implementation == "cudnn" and platform() != "gpu":
        raise Missing("cuDNN needs a GPU")
    allowed = dense_mask(jax.tree.map(jnp.asarray, mask), mask.start.shape[1])[:, None]
    some = jnp.asarray(mask.start < mask.stop)[..., None, None]

    def run(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=implementation)
        # jax.nn returns the mean of v for a query with no visible key; ours returns 0.
        return jnp.where(some, out, 0).astype(q.dtype)

    return run


def splash(mask: IntervalMask, interpret: bool = False) -> Attention:
    """JAX's splash attention with `stop` in place of the query index, so that no mask is stored.

    Documents become segment ids. Splash builds its block tables at trace time, so every row of the
    batch must have the same mask; in exchange it skips as many blocks as it can.
    """
    if platform() != "tpu" and not interpret:
        raise Missing("splash attention needs a TPU")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    start, stop = mask.start[0], mask.stop[0]
    if (mask.start != start).any() or (mask.stop != stop).any():
        raise Missing("splash attention needs a static mask: all rows must be equal")
    length = len(stop)
    # The start of a document identifies it; PAD tokens form a segment of their own.
    segments = jnp.asarray(np.where(start < stop, start, length))

    class StopMask(masks._ComputableMask):
        """A key is visible to a query if its index is below the query's `stop`."""

        def __init__(self):
            super().__init__((length, length), lambda stop, key: key < stop)
            self.q_sequence = stop.astype(np.int32)

        def __eq__(self, other):
            return self is other

        def __hash__(self):
            return id(self)

    one = StopMask()

    def run(q, k, v):
        groups = q.shape[2] // k.shape[2]
        heads = masks.MultiHeadMask([one] * groups)
        sizes = kernel.BlockSizes(
            block_q=512, block_kv=512, block_kv_compute=512, block_q_dkv=512, block_kv_dkv=512,
            block_kv_dkv_compute=512, use_fused_bwd_kernel=True,
        )  # fmt: skip
        attention = kernel.make_splash_mqa(
            heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        ids = kernel.SegmentIds(segments, segments)
        call = jax.vmap(functools.partial(attention, segment_ids=ids))  # over key/value heads
        q = (q * q.shape[-1] ** -0.5).reshape(*q.shape[:2], k.shape[2], groups, -1)
        q, k, v = q.transpose(0, 2, 3, 1, 4), *(x.swapaxes(1, 2) for x in (k, v))
        out = jax.vmap(call)(q, k, v).transpose(0, 3, 1, 2, 4)  # [B, L, K, G, H]
        out = out.reshape(*out.shape[:2], -1, out.shape[-1])
        return jnp.where((start < stop)[None, :, None, None], out, 0).astype(out.dtype)

    return run


def tokamax(mask: IntervalMask) -> Attention:
    """tokamax with the dense mask: its public API takes no per-query key ranges."""
    if importlib.util.find_spec("tokamax") is None:
        raise Missing("tokamax is not installed")
    import tokamax as library

    allowed = dense_mask(jax.tree.map(jnp.asarray, mask), mask.start.shape[1])[:, None]
    some = jnp.asarray(mask.start < mask.stop)[..., None, None]

    def run(q, k, v):
        out = library.dot_product_attention(q, k, v, mask=allowed)
        return jnp.where(some, out, 0).astype(q.dtype)

    return run


PEERS: dict[str, Callable[[IntervalMask], Attention]] = {
    "ours": ours,
    "dense": dense,
    "jax.nn xla": functools.partial(jax_nn, implementation="xla"),
    "jax.nn cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "splash": splash,
    "tokamax": tokamax,
}
