"""Handwritten digits without attention: DiffuSSM on the digits of `digits.py`, which it only draws.

bash launch/demo.sh --config=configs/digits_diffussm.py

1646 s for 1,000 steps; draw 100.0 %, Fréchet 0.74 (real digits 0.57), by `evaluate`. The 2 cores were
shared with up to ten other programs; beside them a step takes as long as one of `digits.py`. 1.4 M
parameters, 6.0e12 FLOPs of training (`digits.py`: 1.7e13).
"""

from monoformer_jax.models import base_config, named_size


def get_config(size: str = "small"):
    """`size` is "small", or "tiny" for a short test."""
    c = base_config("diffussm")
    c.name = "digits_diffussm"
    c.steps = 1000
    c.batch_size = 32
    c.checkpoint_every = 200
    c.data.mixture = {"draw": 1.0}
    c.data.max_seq_len = 84  # one image of 64 values and its prompt
    c.data.end_of_prompt = False
    c.optimizer.update(learning_rate=1.5e-3, weight_decay=0.0)
    c.model.update(named_size(size, "diffussm"))
    if size == "tiny":
        c.steps, c.batch_size, c.log_every, c.checkpoint_every = 20, 4, 1, 10
    return c
