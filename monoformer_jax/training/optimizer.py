"""AdamW with warm-up, cosine or constant learning rate and global-norm clipping (optax)."""

from __future__ import annotations

import jax
import optax

from monoformer_jax.config import OptimizerConfig


def learning_rate(c: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_fraction` of the rate, or a constant one.

    With `restart_step`, both begin there, from the rate at which the finished run ended.
    """
    final_fraction = 1.0 if c.schedule == "constant" else c.final_fraction
    steps, end_value = steps - c.restart_step, final_fraction * c.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=end_value if c.restart_step else 0.0,
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),
        end_value=end_value,
    )
    return (lambda step: schedule(step - c.restart_step)) if c.restart_step else schedule


def make_optimizer(c: OptimizerConfig, steps: int, axes: dict) -> optax.GradientTransformation:
    """Builds the optimizer.

    Args:
      axes: logical axis names of the parameters, which distinguish matrices from stacked norm scales.
    """

    def decays(names):
        return c.decay_everything or sum(name != "layers" for name in names) > 1

    mask = jax.tree.map(decays, axes, is_leaf=lambda x: isinstance(x, tuple))
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            learning_rate(c, steps),
            c.b1,
            c.b2,
            weight_decay=c.weight_decay,
            mask=mask,
            mu_dtype=c.first_moment_dtype,
        ),
    )
