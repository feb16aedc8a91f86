"""Shared config of the paper's runs: model, data and the original's training recipe."""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size


def paper_config(name: str, target: str, batch: dict[str, int], paper_batch: int, mixture: dict):
    """The config of a run of the paper on a TPU slice.

    Learning rate, EMA, clipping, mixture and loss weights are the original's.

    Args:
      name: name of the run.
      target: a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test.
      batch: packed rows per step for each target.
      paper_batch: batch size of the original. With a larger batch, the learning rate is scaled by
        the square root of the ratio, and the number of steps is divided by the ratio.
      mixture: weight of each source; its records are in records/SOURCE.
    """
    require(target in batch, f"there is no target {target!r}; there are {', '.join(batch)}")
    c = base_config()
    c.name = name
    c.batch_size = batch[target]
    c.steps = 500_000 * paper_batch // c.batch_size
    c.checkpoint_every = 5000
    c.log_every = 100
    c.model.update(named_size("tinyllama_1b"))
    c.model.remat = "save_names:attention_out"
    c.data.mixture = mixture
    c.data.records = {source: f"records/{source}" for source in mixture}
    c.data.sample_latents = True
    c.data.tokenizer = "tokenizer.json"
    c.data.image_size = 32
    c.data.max_seq_len = 2048
    c.data.prompt_dropout = 0.1
    c.loss.text_weight = 0.01
    c.optimizer.update(
        learning_rate=1e-4 * (c.batch_size / paper_batch) ** 0.5, schedule="constant",
        warmup_steps=0, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=2.0, ema_decay=0.9999,
    )  # fmt: skip
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.sampling.update(steps=50, guidance=4.0)
    if target == "7b":
        c.model.update(named_size("7b"))
        c.data.max_seq_len = 4096
    if target == "tiny":
        c.model.update(named_size("tiny"), vocab_size=262)
        c.data.update(tokenizer="bytes", image_size=8, max_seq_len=64)
        c.steps, c.log_every, c.checkpoint_every = 20, 1, 10
    return c
