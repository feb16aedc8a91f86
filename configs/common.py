"""Shared config of the paper's runs: model, data, the original's training recipe and a modern one."""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size


def paper_config(
    name: str,
    target: str,
    mixture: dict[str, float],
    *,
    rows: dict[str, tuple[int, int]],
    document: int,
    paper_batch: int,
):
    """The config of a run of the paper on a TPU slice.

    EMA, clipping, mixture and loss weights are the original's, and so is the learning rate with the
    original's batch. With a batch of n times as many documents it is √n times as high, as Adam's noise
    asks for (arXiv 2205.10287), and there are 1/n as many steps, which see as many documents.

    Args:
      name: name of the run.
      target: a slice, "v5e-64", "v5e-256" or "v6e-64"; "paper", the original's batch, on v5e-32; "7b",
        for v5e-256; or "tiny", a test. With ",modern" after it `modern_recipe` replaces the
        original's; "modern" is "v5e-64,modern".
      mixture: weight of each source; its records are in records/SOURCE.
      rows: packed rows per step and tokens per row, for each target.
      document: tokens of a document in the mean.
      paper_batch: documents per step of the original.
    """
    target, modern = split_target(target)
    require(target in rows, f"there is no target {target!r}; there are {', '.join(rows)}, modern")
    c = base_config()
    c.name = name
    c.batch_size, c.data.max_seq_len = rows[target]
    larger = c.batch_size * max(c.data.max_seq_len // document, 1) / paper_batch
    c.steps = round(500_000 / larger)
    c.checkpoint_every = 5000
    c.log_every = 100
    c.model.update(named_size("tinyllama_1b"))
    # The least predicted step of those compiled (docs/benchmarks.md).
    c.model.remat = "save_names:qkv,attention_out,residual,mlp_hidden"
    c.model.scan_unroll = 11
    c.data.mixture = mixture
    c.data.records = {source: f"records/{source}" for source in mixture}
    c.data.sample_latents = True
    c.data.tokenizer = "tokenizer.json"
    c.data.image_size = 32
    c.data.prompt_dropout = 0.1
    c.loss.text_weight = 0.01
    c.optimizer.update(
        learning_rate=1e-4 * larger**0.5, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999,
        weight_decay=0.0, clip_norm=2.0, ema_decay=0.9999,
    )  # fmt: skip
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.sampling.update(steps=50, guidance=4.0)
    if target == "7b":
        c.model.update(named_size("7b"), remat="save_names:attention_out", scan_unroll=8)
    if target == "tiny":
        c.model.update(named_size("tiny"), vocab_size=262, scan_unroll=2)
        c.data.update(tokenizer="bytes", image_size=8)
        c.steps, c.log_every, c.checkpoint_every = 20, 1, 10
    return modern_recipe(c) if modern else c


def split_target(target: str) -> tuple[str, bool]:
    """Returns the target without ",modern", and whether it had it."""
    name, _, recipe = target.partition(",")
    if name == "modern":
        name, recipe = "v5e-64", "modern"
    require(recipe in ("", "modern"), f"there is no recipe {recipe!r}; there is modern")
    return name, bool(recipe)


def modern_recipe(c):
    """Today's practice instead of the original's; which of it helps this model was not measured.

    Learning rate, EMA and loss weights stay the original's. Two options that need a reason to be on:
    --config.model.qk_norm=True, only from random weights, since a LLaMA has no such norms; and
    --config.loss.z_loss=1e-4.
    """
    # AdamW of LLaMA (arXiv 2302.13971) and Transfusion (arXiv 2408.11039); the warm-up is the latter's,
    # and protects the loaded weights from image layers that are new.
    c.optimizer.update(b2=0.95, clip_norm=1.0, warmup_steps=4000, weight_decay=0.1)
    c.optimizer.decay_everything = False  # matrices alone, as in maxtext and nanoGPT
    c.model.zero_image_head = True  # DiT, arXiv 2212.09748
    # Shift by the number of values of an image, sqrt(values / 4096) (RAE, arXiv 2510.11690): 1 for 256
    # patches of 16 values. sampling.shift=0 takes the same.
    values = c.data.image_size**2 * c.model.channels
    c.objective.shift = max(1.0, (values / 4096) ** 0.5)
    c.sampling.shift = 0.0
    # To look at: BAGEL, arXiv 2505.14683 (its README: text scale 4, interval 0.4 to 1).
    c.sampling.update(guidance=4.0, guidance_low=0.4, guidance_high=1.0)
    # To score: 1.5 of SiT, arXiv 2401.08740; no guidance near noise, arXiv 2404.07724, where the README
    # of REPA, arXiv 2410.06940, has up to 0.7.
    c.sampling.update(fid_guidance=1.5, fid_guidance_low=0.0, fid_guidance_high=0.7)
    return c
