"""Visual question answering and text-to-image: LLaVA's instructions and JourneyDB, one to one.

    python -m monoformer_jax.train --config=configs/llava_journeydb.py:v5e-64 --workdir=gs://… \\
        --config.init_from=runs/tinyllama

TinyLlama's size and weights (`convert` makes the workdir for init_from); conditioning and generated
images are the same 32×32×4 latents of Stable Diffusion's autoencoder, clean or noised. Rows of 2048
tokens packed with complete documents. Learning rate, EMA, clipping, mixture and loss weights are the
original's. `:modern` has today's recipe (`modern_recipe` in common.py, with the source of each value).
It has not been run at this size.

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

from common import paper_config

# Packed rows of 2048 tokens per step. See `paper_config` for the learning rate.
BATCH = {"v5e-64": 64, "v6e-64": 128, "v5e-256": 256, "7b": 256, "tiny": 8}


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test.

    "modern" is the modern recipe for v5e-64, and ",modern" after a target that for another one.
    """
    mixture = {"llava": 0.5, "journeydb": 0.5}
    return paper_config("llava_journeydb", target, BATCH, paper_batch=64, mixture=mixture)
