"""Classifier-free guidance: within an interval of t, with its size kept, by text and image apart."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Guidance:
    """How strongly to guide; numbers, or arrays that broadcast against [B, n, P]."""

    scale: float | jax.Array = 1.0  # by the text, or by everything there is
    image_scale: float | jax.Array = 1.0  # by the images that are shown
    low: float | jax.Array = 0.0  # it acts where low <= t <= high
    high: float | jax.Array = 1.0
    rescale: float | jax.Array = (
        0.0  # 0 leaves the size of what comes out, 1 makes it the unguided one
    )


def classifier_free_guidance(
    branches: jax.Array, t: jax.Array, guidance: Guidance, values: int | None = None
) -> jax.Array:
    """One prediction of those with more and with less to go by.

    The first branch knows everything and the last knows least. Two branches give

        less + scale (everything - less)                         Ho & Salimans, arXiv 2207.12598

    and three, the second of which knows the images but not the text,

        nothing + image_scale (images - nothing) + scale (everything - images)
                                                                 Brooks et al., arXiv 2211.09800

    Outside of the interval (Kynkäänniemi et al., arXiv 2404.07724, on the clock of
    `rectified_flow`) it is the first branch.

    Args:
      branches: [B, branches, n, P], one to three.
      t: noise level.
      values: how many of the first of the P values are guided; the others are the first branch's.

    Returns:
      [B, n, P]. With `rescale` φ it is φ g std(first) / std(g) + (1 - φ) g for the guided g, each
      deviation over n and P (Lin et al., arXiv 2305.08891, section 3.4).
    """
    first = branches[:, 0]
    if branches.shape[1] == 1:
        return first
    less = branches[:, 1]
    guided = less + guidance.scale * (first - less)
    if branches.shape[1] == 3:
        nothing = branches[:, 2]
        guided = guided + (guidance.image_scale - 1) * (less - nothing)
    size = first.std((1, 2), keepdims=True) / jnp.maximum(guided.std((1, 2), keepdims=True), 1e-6)
    guided = guided * (1 + guidance.rescale * (size - 1))
    guided = jnp.where((guidance.low <= t) & (t <= guidance.high), guided, first)
    if values is None:
        return guided
    return jnp.concatenate([guided[..., :values], first[..., values:]], -1)
