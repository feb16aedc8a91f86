"""Classifier-free guidance: in an interval of t, with rescaling, and separate text and image scales."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Guidance:
    """Guidance parameters: numbers, or arrays that broadcast against [B, n, P]."""

    scale: float | jax.Array = 1.0  # of the text or, with two branches, of all conditions
    image_scale: float | jax.Array = 1.0  # of the conditioning images
    low: float | jax.Array = 0.0  # guidance is applied where low <= t <= high
    high: float | jax.Array = 1.0
    rescale: float | jax.Array = 0.0  # φ: 0 is off, 1 restores the standard deviation of branch 0


def classifier_free_guidance(
    branches: jax.Array, t: jax.Array, guidance: Guidance, values: int | None = None
) -> jax.Array:
    """Combines predictions that are conditioned on more and on less.

    The first branch has all conditions and the last has the fewest. Two branches yield

        less + scale (full - less)                               Ho & Salimans, arXiv 2207.12598

    and three, the second of which has the images but not the text,

        none + image_scale (images - none) + scale (full - images)
                                                                 Brooks et al., arXiv 2211.09800

    Outside the interval (Kynkäänniemi et al., arXiv 2404.07724, with the t of `rectified_flow`) the
    result is the first branch.

    Args:
      branches: [B, branches, n, P], one to three.
      t: noise level.
      values: number of leading P values that are guided; the others are the first branch's.

    Returns:
      [B, n, P]. With `rescale` φ it is φ g std(first) / std(g) + (1 - φ) g for the guided g, each
      standard deviation over n and P (Lin et al., arXiv 2305.08891, section 3.4).
    """
    first = branches[:, 0]
    if branches.shape[1] == 1:
        return first
    less = branches[:, 1]
    guided = less + guidance.scale * (first - less)
    if branches.shape[1] == 3:
        none = branches[:, 2]
        guided = guided + (guidance.image_scale - 1) * (less - none)
    ratio = first.std((1, 2), keepdims=True) / jnp.maximum(guided.std((1, 2), keepdims=True), 1e-6)
    guided = guided * (1 + guidance.rescale * (ratio - 1))
    guided = jnp.where((guidance.low <= t) & (t <= guidance.high), guided, first)
    if values is None:
        return guided
    return jnp.concatenate([guided[..., :values], first[..., values:]], -1)
