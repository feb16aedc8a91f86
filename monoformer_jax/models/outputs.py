"""Outputs of a model's forward pass over packed rows."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Outputs:
    """Outputs for a batch [B, L].

    Attributes:
      prediction: float32 [B, L, P], prediction of the objective's target; valid at PATCH tokens only.
      variance: float32 [B, L, P] if the objective learns it, else None.
      text_hidden: [B, L, D] in the compute dtype, input of the text head; None for a model without
        text.
      aux: weighted auxiliary losses, by name.
    """

    prediction: jax.Array
    variance: jax.Array | None = None
    text_hidden: jax.Array | None = None
    aux: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
