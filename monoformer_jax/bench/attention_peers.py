"""Other implementations that can compute the same attention, where they are installed.

Each maker takes the mask of the rows (host arrays) and gives a function (q, k, v) -> output
[B, L, N, H], or raises `Missing` with the reason. What a peer needs beside q, k and v (a dense
mask, block tables) is made here, before the clock starts, which favours the peers.
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
    """This peer cannot run here; the text says why."""


def platform() -> str:
    """ "cpu", "tpu" or "gpu"."""
    return {"cuda": "gpu"}.get(jax.devices()[0].platform, jax.devices()[0].platform)


def ours(mask: IntervalMask) -> Attention:
    """The kernel of this platform."""
    if platform() == "cpu":
        raise Missing("there is no kernel for a CPU; dense is what runs there")
    mask = jax.tree.map(jnp.asarray, mask)
    return lambda q, k, v: interval_attention(q, k, v, mask, impl=platform())


def dense(mask: IntervalMask) -> Attention:
    """The library's own path without a kernel."""
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
        # A query that sees nothing gets the mean of v there; here it is 0.
        return jnp.where(some, out, 0).astype(q.dtype)

    return run


def splash(mask: IntervalMask, interpret: bool = False) -> Attention:
    """JAX's splash attention with `stop` in place of the query's index: no mask is stored.

    Documents become segment ids. Its tables are fixed when tracing, so every row of the batch must
    have the same mask; splash then skips as well as it can.
    """
    if platform() != "tpu" and not interpret:
        raise Missing("splash attention needs a TPU")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    start, stop = mask.start[0], mask.stop[0]
    if (mask.start != start).any() or (mask.stop != stop).any():
        raise Missing("splash attention fixes the mask when tracing: rows must be equal")
    length = len(stop)
    # Documents start at different tokens; PAD sees nothing and is a segment of its own.
    segments = jnp.asarray(np.where(start < stop, start, length))

    class StopMask(masks._ComputableMask):
        """Key k is seen by a query whose `stop` lies behind it."""

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
    """tokamax with the dense mask: its public function takes no ranges."""
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
