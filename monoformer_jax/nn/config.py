"""Config of a transformer decoder, and its FLOPs."""

from __future__ import annotations

import dataclasses

from monoformer_jax.config import at_least, one_of, positive
from monoformer_jax.errors import require

REMAT_POLICIES = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
# Activations of a block that "save_names:" can save: q, k and v after RoPE; the attention output with
# its softmax statistics; the residual stream after attention; the two products before the gate of the
# feed-forward.
SAVED_NAMES = ("qkv", "attention_out", "residual", "mlp_hidden")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A stack of LLaMA blocks with the interval mask."""

    num_layers: int = 6
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 344
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    # RMSNorm of queries and keys of each head, before RoPE (arXiv 2302.05442, 2403.03206): keeps
    # attention logits small in long runs. For a model that is trained from random weights.
    qk_norm: bool = False
    dtype: str = "bfloat16"  # compute dtype of matrix products; parameters, norms, losses: float32
    # Activations of a block that are saved for the backward pass: a name in jax.checkpoint_policies,
    # "none" (no remat), or "save_names:a,b" with names of `SAVED_NAMES`; the rest is recomputed.
    remat: str = "nothing_saveable"
    # Blocks in a turn of the loop over blocks in training, or the greatest divisor that num_layers has
    # in common with it: collectives of one run beside the products of the next on a TPU
    # (docs/benchmarks.md), but more is compiled. It changes time and memory alone.
    scan_unroll: int = 1
    attention: str = "auto"  # see attention.interval_attention

    def __post_init__(self):
        positive(self, "model", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim",
                 "head_dim", "scan_unroll")  # fmt: skip
        at_least(self, "model", 0, "norm_eps")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for RoPE")
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.attention", self.attention, ("auto", "dense", "tpu", "gpu"))
        policy, colon, names = self.remat.partition(":")
        if colon and policy == "save_names":
            for name in names.split(","):
                one_of("a name in model.remat", name, SAVED_NAMES)
        else:
            one_of("model.remat", self.remat, (*REMAT_POLICIES, "save_names:NAME,…"))

    def flops(self, tokens: int, pairs: int) -> int:
        """FLOPs of a forward pass: matrix products only, two per multiply-add.

        Args:
          tokens: number of tokens.
          pairs: number of (query, key) pairs that the mask allows, per block.
        """
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim  # q, out; k, v
        token = 2 * self.num_layers * self.embed_dim * (heads + 3 * self.mlp_dim)
        return token * tokens + 4 * self.num_layers * self.num_heads * self.head_dim * pairs

    def recomputed_flops(self, tokens: int) -> int:
        """FLOPs that remat="nothing_saveable" recomputes: all but the last product of a block, which no
        gradient needs. Attention scores are not counted; 0 for any other policy."""
        if self.remat != "nothing_saveable":
            return 0
        return self.flops(tokens, 0) - 2 * self.num_layers * self.embed_dim * self.mlp_dim * tokens
