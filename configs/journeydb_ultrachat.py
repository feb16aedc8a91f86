"""Text-to-image and chat in one model: JourneyDB and UltraChat, nine documents to one.

    python -m monoformer_jax.train --config=configs/journeydb_ultrachat.py:v5e-64 --workdir=gs://… \\
        --config.init_from=runs/tinyllama

TinyLlama's size and weights (`convert` makes the workdir for init_from), 32×32×4 latents of Stable
Diffusion's autoencoder, rows of 2048 tokens packed with complete documents. Learning rate, EMA,
clipping, mixture and loss weights are the original's. `:modern` has today's recipe (`modern_recipe` in
common.py, with the source of each value). It has not been run at this size.

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

from common import paper_config, split_target

# Packed rows of 2048 tokens per step. See `paper_config` for the learning rate.
BATCH = {"v5e-64": 64, "v6e-64": 128, "v5e-256": 256, "7b": 256, "tiny": 8}


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test.

    "modern" is the modern recipe for v5e-64, and ",modern" after a target that for another one.
    """
    mixture = {"journeydb": 0.9, "ultrachat": 0.1}
    c = paper_config("journeydb_ultrachat", target, BATCH, paper_batch=64, mixture=mixture)
    c.data.truncate_text = split_target(target)[1]  # the original drops chats longer than a row
    return c
