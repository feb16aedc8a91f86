"""Handwritten digits on a laptop CPU: one model for the tasks draw, read and say.

    python -m monoformer_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m monoformer_jax.evaluate --workdir=runs/digits --json=scores.json
    python -m monoformer_jax.sample --workdir=runs/digits --paint --prompt="draw a one" --out=one.png
    python -m monoformer_jax.convert --from=runs/digits --to=export --check

`bash launch/demo.sh` does the first three. `:pages` has documents of two images as well
(docs/transfusion.md).

611 s for 1,400 steps on 2 CPU cores, partly beside other programs, 203 s on faster idle ones, with
compilation. `evaluate`: draw 100.0 %, Fréchet 0.70 (real digits 0.57), read 97.2 %, say 100.0 %, one
image for each of 100 draw prompts.
"""

from monoformer_jax.models import base_config, named_size


def get_config(size: str = "small"):
    """`size` is "small", "tiny" for a short test, as in `--config=configs/digits.py:tiny`, or "pages":
    small, with documents of two images and their names."""
    c = base_config()
    c.name = "digits"
    c.steps = 1400
    c.batch_size = 12
    c.checkpoint_every = 200
    c.data.max_seq_len = 160
    c.data.end_of_prompt = False  # `say` prompts are incomplete sentences
    c.optimizer.learning_rate = 1.5e-3
    if size == "pages":
        c.name, size = "digits_pages", "small"
        c.data.mixture = {"draw": 0.35, "read": 0.2, "say": 0.1, "page": 0.35}
    c.model.update(named_size(size))
    if size == "tiny":
        c.steps, c.batch_size, c.log_every, c.checkpoint_every = 20, 4, 1, 10
    return c
