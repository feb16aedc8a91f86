"""The custom VJP shared by the TPU and GPU kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from monoformer_jax.attention.dense import EMPTY_LSE

LOG2E = 1.4426950408889634
# The kernels' log-sum-exp of a query that sees nothing: exp2(score - NOTHING) is 0 in the backward
# pass.
NOTHING = 1e30


def natural_lse(lse: jax.Array) -> jax.Array:
    """Converts the kernels' base-2 log-sum-exp to that of `dense_attention`."""
    return jnp.where(lse == NOTHING, EMPTY_LSE, lse / LOG2E)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Builds (static, q, k, v, mask) -> (output, natural log-sum-exp), differentiable in both.

    Args:
      forward: (static, q, k, v, mask) -> output, natural log-sum-exp, and the kernel's own.
      backward: (static, q, k, v, mask, output, kernel's log-sum-exp, cotangents) -> dq, dk, dv.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(static, q, k, v, mask):
        return forward(static, q, k, v, mask)[:2]

    def rule_forward(static, q, k, v, mask):
        out, natural, lse = forward(static, q, k, v, mask)
        # Named inside the rule, so that a remat policy that saves them does not rerun the kernel.
        out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
        return (out, natural), (q, k, v, mask, out, lse)

    def rule_backward(static, residuals, cotangents):
        return (*backward(static, *residuals, *cotangents), None)

    attention.defvjp(rule_forward, rule_backward)
    return attention
