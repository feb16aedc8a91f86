"""Pictures from captions and chat in one model: JourneyDB and UltraChat, nine documents to one.

    python -m monoformer_jax.train --config=configs/journeydb_ultrachat.py:v5e-64 --workdir=gs://… \\
        --config.init_from=runs/tinyllama

TinyLlama's size and weights (`convert` makes the start), 32×32×4 latents of Stable Diffusion's
autoencoder, rows of 2048 tokens packed with whole documents. Learning rate, average, clipping, mixture
and the weights of the losses are the original's. It has not been run at this size.

`python -m monoformer_jax.plan --config=configs/journeydb_ultrachat.py --topology=v5e:4x4` (nothing was
timed):

  journeydb_ultrachat on v5e:4x4: 1,122.1 M parameters, 16 devices, mesh data=1, fsdp=16, tensor=1,
        train
    compiled in 105 s
    memory of a device, GiB
      arguments       1.056
      temporaries     2.808
      peak            3.891
      HBM            15.750   75% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      collective-permute  fsdp           2535      1629.2
      all-gather          fsdp             70      1133.8
      all-reduce          fsdp             29       310.5
      all-to-all          fsdp             14        64.2
    a step takes at least the largest of three, ms
      compute      241.7   products of the blocks at 197 TFLOP/s in bfloat16
      HBM          2.767   state read and written once at 819 GB/s
      ICI          15.69   collectives over all links, 200 GB/s out
    model FLOPs of a step: 8.862e+14
      at 40% of peak: 702.9 ms a step, 186,485 tokens/s, up to 637 images/s, 500,000 steps in 97.6 h
      at 50% of peak: 562.3 ms a step, 233,106 tokens/s, up to 797 images/s, 500,000 steps in 78.1 h
"""

from monoformer_jax.config import base_config, named_size, require

# Packed rows of 2048 tokens a step. The learning rate grows with the square root.
BATCH = {"v5e-64": 64, "v6e-64": 128, "v5e-256": 256, "7b": 256, "tiny": 8}


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test."""
    require(target in BATCH, f"there is no target {target!r}; there are {', '.join(BATCH)}")
    c = base_config()
    c.name = "journeydb_ultrachat"
    c.batch_size = BATCH[target]
    c.steps = 500_000 * 64 // c.batch_size
    c.checkpoint_every = 5000
    c.log_every = 100
    c.model.update(named_size("tinyllama_1b"))
    c.model.remat = "save_names:attention_out"
    c.data.mixture = {"journeydb": 0.9, "ultrachat": 0.1}
    c.data.records = {"journeydb": "records/journeydb", "ultrachat": "records/ultrachat"}
    c.data.moments = True
    c.data.tokenizer = "tokenizer.json"
    c.data.image_size = 32
    c.data.row_length = 2048
    c.data.prompt_dropout = 0.1
    c.loss.text_weight = 0.01
    c.optimizer.update(
        learning_rate=1e-4 * (c.batch_size / 64) ** 0.5, schedule="constant", warmup_steps=0,
        b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=2.0, ema_decay=0.9999,
    )  # fmt: skip
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.sampling.update(steps=50, guidance=4.0)
    if target == "7b":
        c.model.update(named_size("7b"))
        c.data.row_length = 4096
    if target == "tiny":
        c.model.update(named_size("tiny"), vocab_size=262)
        c.data.update(tokenizer="bytes", image_size=8, row_length=64)
        c.steps, c.log_every, c.checkpoint_every = 20, 1, 10
    return c
