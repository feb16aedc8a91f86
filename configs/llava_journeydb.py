"""Pictures to answer about and pictures to paint: LLaVA's instructions and JourneyDB, one to one.

    python -m monoformer_jax.train --config=configs/llava_journeydb.py:v5e-64 --workdir=gs://… \\
        --config.init_from=runs/tinyllama

TinyLlama's size and weights (`convert` makes the start); pictures to look at and to paint are the same
32×32×4 latents of Stable Diffusion's autoencoder, clean or noised. Rows of 2048 tokens packed with
whole documents. Learning rate, average, clipping, mixture and the weights of the losses are the
original's. It has not been run at this size.

`python -m monoformer_jax.plan --config=configs/llava_journeydb.py --topology=v5e:8x8` (nothing was
timed):

    llava_journeydb on v5e:8x8: 1,122.1 M parameters, 64 devices, mesh data=1, fsdp=64, tensor=1, train
    compiled in 60 s
    memory of a device, GiB
      arguments       0.320
      temporaries     0.893
      peak            1.246
      HBM            15.750   92% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      all-reduce          fsdp             98      6717.2
      all-gather          fsdp            133      3127.0
      all-to-all          fsdp             14        16.9
    a step takes at least the largest of three, ms
      compute      60.43   products of the blocks at 197 TFLOP/s in bfloat16
      HBM         0.8382   state read and written once at 819 GB/s
      ICI          49.31   collectives over all links, 200 GB/s out
    model FLOPs of a step: 8.862e+14
      at 40% of peak: 175.7 ms a step, 745,938 tokens/s, up to 2,550 images/s, 500,000 steps in 24.4 h
      at 50% of peak: 140.6 ms a step, 932,423 tokens/s, up to 3,187 images/s, 500,000 steps in 19.5 h
"""

from monoformer_jax.config import base_config, named_size, require

# Packed rows of 2048 tokens a step. The learning rate grows with the square root.
BATCH = {"v5e-64": 64, "v6e-64": 128, "v5e-256": 256, "7b": 256, "tiny": 8}


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test."""
    require(target in BATCH, f"there is no target {target!r}; there are {', '.join(BATCH)}")
    c = base_config()
    c.name = "llava_journeydb"
    c.batch_size = BATCH[target]
    c.steps = 500_000 * 64 // c.batch_size
    c.checkpoint_every = 5000
    c.log_every = 100
    c.model.update(named_size("tinyllama_1b"))
    c.model.remat = "save_names:attention_out"
    c.data.mixture = {"llava": 0.5, "journeydb": 0.5}
    c.data.records = {"llava": "records/llava", "journeydb": "records/journeydb"}
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
