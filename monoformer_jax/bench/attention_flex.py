"""Times PyTorch's FlexAttention with CUDA events, where torch with CUDA is installed."""

from __future__ import annotations

import numpy as np

from monoformer_jax.attention import IntervalMask
from monoformer_jax.bench.attention_peers import Missing


def times(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, mask: IntervalMask, repeats: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Times compiled FlexAttention; its block mask is created before timing starts.

    Args:
      q, dout: float32 [B, L, N, H]. k, v: [B, S, K, H]. They are rounded to bfloat16.
      mask: [B, L].
      repeats: timed calls.

    Returns:
      The output, float32 [B, L, N, H], and milliseconds per pass.

    Raises:
      Missing: torch is not installed or finds no CUDA device.
    """
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Missing("torch with FlexAttention is not installed") from error
    if not torch.cuda.is_available():
        raise Missing("torch finds no CUDA device")
    start, stop = (torch.tensor(np.asarray(x), device="cuda") for x in (mask.start, mask.stop))

    def seen(row, head, query, key):
        return (key >= start[row, query]) & (key < stop[row, query])

    batch, length = mask.start.shape
    table = create_block_mask(seen, batch, None, length, k.shape[1], device="cuda")
    tensors = [
        torch.tensor(x, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for x in (q, k, v)
    ]
    tensors = [x.contiguous().requires_grad_() for x in tensors]
    gradient = torch.tensor(dout, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    run = torch.compile(flex_attention)

    def forward():
        return run(*tensors, block_mask=table, enable_gqa=True)

    out = forward()

    def backward():
        torch.autograd.grad(out, tensors, gradient, retain_graph=True)

    def both():
        torch.autograd.grad(forward(), tensors, gradient)

    found = {}
    for name, call in (("forward", forward), ("backward", backward), ("both", both)):
        for _ in range(3):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        found[name] = begin.elapsed_time(end) / repeats
    return out.detach().transpose(1, 2).float().cpu().numpy(), found
