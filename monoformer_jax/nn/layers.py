"""The layers of a LLaMA block: linear, RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Parameters are float32 and carry `axes`, the logical name of each dimension, which `parallel.py` maps
to mesh axes; they are cast to the compute dtype where they are used.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from monoformer_jax.attention import IntervalMask, interval_attention
from monoformer_jax.attention.tpu_forward import LANES, matmul_precision
from monoformer_jax.nn import lora
from monoformer_jax.nn.config import DecoderConfig
from monoformer_jax.parallel import current_device, tensor_shards

Axes = tuple[str | None, ...]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, stddev: float) -> nnx.Param:
    """Truncated normal initialization with standard deviation `stddev`, cut off at ±2."""
    # The constant is the standard deviation of the standard normal truncated to [-2, 2].
    value = stddev / 0.87962566 * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape)
    return nnx.Param(value, axes=axes)


def full_precision(dtype):
    """Context in which products of float32 operands are float32; for other dtypes it does nothing.

    By default a TPU rounds the operands to bfloat16, and a GPU to TF32.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def float32_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b for operands of one dtype, accumulated and returned in float32."""
    precision = matmul_precision(a.dtype)
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def head_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product of an output head, x [..., D] and float32 [D, P] -> float32 [..., P].

    Operands are in x's dtype. The gradient of the kernel is float32 before it is reduced over devices;
    that of a cast kernel would be rounded to x's dtype.
    """
    return float32_matmul(x, kernel.astype(x.dtype))


def _head_matmul_backward(residuals, cotangent):
    x, kernel = residuals
    cotangent = cotangent.astype(x.dtype)
    d_x = float32_matmul(cotangent, kernel.astype(x.dtype).T).astype(x.dtype)
    x, cotangent = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
    return d_x, float32_matmul(x.T, cotangent)


head_matmul.defvjp(lambda x, kernel: (head_matmul(x, kernel), (x, kernel)), _head_matmul_backward)


class Linear(nnx.Module):
    """[..., D_in] -> [..., D_out] with bias."""

    def __init__(self, d_in: int, d_out: int, axes: Axes, *, rngs: nnx.Rngs, zero: bool = False):
        self.kernel = parameter(rngs, (d_in, d_out), axes, 0.0 if zero else d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=axes[1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)

    def float32(self, x: jax.Array) -> jax.Array:
        """The same as the last layer of a head, see `head_matmul`; returns float32."""
        return head_matmul(x, self.kernel[...]) + self.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm (LLaMA), computed in float32, returned in the input's dtype."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim), axes=("norm",))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


@jax.named_scope("rope")
def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on halves of the head dim, as in LLaMA's Hugging Face weights.

    Args:
      x: [B, L, N, H].
      positions: int32 [B, L].
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, L, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Pairs of heads that are sharded over `tensor` would have to be gathered.
    if current_device().platform == "tpu" and tensor_shards() == 1:
        return rotate_by_product(x, cos, sin)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@jax.custom_vjp
def rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The rotation of `rope`, with the halves of a head exchanged by a product with 0 and ±1.

    The result is the same, since the product is exact. The matrix units of a TPU do it beside the
    projections, while a concatenation of halves of 128 lanes moves the array through memory.

    Args:
      x: [B, L, N, H].
      cos, sin: float32 [B, L, 1, H/2]; not differentiated.
    """
    *rows, heads, dim = x.shape
    most = max(1, LANES // dim)
    pack = most if heads % most == 0 else 1  # heads that fill the lanes
    half = dim // 2
    turn = np.zeros((dim, dim), np.float32)  # [a, b] @ turn = [-b, a]
    turn[np.arange(half) + half, np.arange(half)] = -1
    turn[np.arange(half), np.arange(half) + half] = 1
    turn = jnp.asarray(np.kron(np.eye(pack), turn), x.dtype)
    z = x.reshape(*rows, heads // pack, pack * dim)
    cos, sin = (jnp.concatenate([y] * (2 * pack), -1) for y in (cos, sin))
    y = z.astype(jnp.float32) * cos + float32_matmul(z, turn) * sin
    return y.astype(x.dtype).reshape(x.shape)


# The gradient of a rotation is the rotation back.
rotate_by_product.defvjp(
    lambda x, cos, sin: (rotate_by_product(x, cos, sin), (cos, sin)),
    lambda angles, cotangent: (rotate_by_product(cotangent, angles[0], -angles[1]), None, None),
)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding under the interval mask."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.config = c
        self.q = parameter(rngs, (D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
        self.k = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.v = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        # Each block adds two terms to the residual stream; this keeps its scale independent of depth.
        stddev = (N * H * 2 * c.num_layers) ** -0.5
        self.out = parameter(rngs, (N, H, D), ("heads", "head_dim", "embed"), stddev)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(H, c.norm_eps), RMSNorm(H, c.norm_eps)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: IntervalMask | tuple[IntervalMask, ...],
        cache=None,
        index=None,
        adapters=None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, L, D] -> [B, L, D], or [B·L, D] -> [B·L, D].

        With a cache (k, v), each [B, S, K, H], the new keys and values are written to the slots
        [index, index + L), the mask ranges over all S slots, and the new cache is returned.
        `adapters` are the LoRA adapters of this block, see `lora`.
        """
        c, dtype, length = self.config, x.dtype, positions.shape[1]

        def project(name):
            # As [D, N·H], so that the kernels take the product without a transposing copy.
            kernel = getattr(self, name)[...].astype(dtype)
            y = lora.add(x @ rearrange(kernel, "D N H -> D (N H)"), x, adapters, name)
            return y.reshape(-1, length, y.shape[-1] // c.head_dim, c.head_dim)

        q, k, v = project("q"), project("k"), project("v")
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, index, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, index, 0, 0))
            cache = (k, v)
        out = interval_attention(q, k, v, mask, impl=c.attention)
        out = out.reshape(*x.shape[:-1], -1)
        y = out @ rearrange(self.out[...].astype(dtype), "N H D -> (N H) D")
        return lora.add(y, out, adapters, "out"), cache


class SwiGLU(nnx.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        D, F = c.embed_dim, c.mlp_dim
        self.gate = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.up = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.down = parameter(rngs, (F, D), ("mlp", "embed"), (F * 2 * c.num_layers) ** -0.5)

    def __call__(self, x: jax.Array, adapters=None) -> jax.Array:
        def product(x, name):
            kernel = getattr(self, name)[...].astype(x.dtype)
            return lora.add(x @ kernel, x, adapters, name)

        gate, up = (checkpoint_name(product(x, name), "mlp_hidden") for name in ("gate", "up"))
        return product(jax.nn.silu(gate) * up, "down")
