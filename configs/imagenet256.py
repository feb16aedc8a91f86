"""Class-conditional ImageNet at 256 pixels, on latents: the model of the paper's first table.

    python -m monoformer_jax.train --config=configs/imagenet256.py:v5e-64 --workdir=gs://… \\
        --config.init_from=runs/tinyllama

TinyLlama's size and weights (`convert` makes the workdir for init_from), 32×32×4 latents of Stable
Diffusion's autoencoder in 256 patches, rows of 512 tokens. Learning rate, EMA, clipping and loss
weights are the original's, and `:modern` has today's recipe (`modern_recipe` in common.py, with the
source of each value); the original trained DDPM, which is --config.objective.kind=ddpm
--config.objective.learn_sigma=True --config.sampling.solver=ddpm. It has not been run at this size.

`python -m monoformer_jax.plan --config=configs/imagenet256.py --topology=v5e:8x8` (nothing was timed):

    imagenet256 on v5e:8x8: 1,122.1 M parameters, 64 devices, mesh data=1, fsdp=64, tensor=1, train
    compiled in 56 s
    memory of a device, GiB
      arguments       0.320
      temporaries     0.917
      peak            1.266
      HBM            15.750   92% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      all-reduce          fsdp             98      6707.7
      all-gather          fsdp            133      3127.0
      all-to-all          fsdp             14        16.7
    a step takes at least the largest of three, ms
      compute      60.43   products of the blocks at 197 TFLOP/s in bfloat16
      HBM         0.8381   state read and written once at 819 GB/s
      ICI          49.26   collectives over all links, 200 GB/s out
    model FLOPs of a step: 8.317e+14
      at 40% of peak: 164.9 ms a step, 794,750 tokens/s, up to 1,552 images/s, 500,000 steps in 22.9 h
      at 50% of peak: 131.9 ms a step, 993,437 tokens/s, up to 1,940 images/s, 500,000 steps in 18.3 h

The 7 B model, `--config=configs/imagenet256.py:7b --topology=v5e:16x16`: peak 4.231 GiB a chip,
73% free, at least 807.9 ms a step.
"""

from common import paper_config, split_target

# Rows per step. The paper's 256 are too few for 256 chips: the collectives of the weights would take
# longer than the matrix products. See `paper_config` for the learning rate and the steps.
BATCH = {"v5e-64": 256, "v6e-64": 512, "v5e-256": 1024, "7b": 256, "tiny": 8}


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "7b", for v5e-256; or "tiny", a test.

    "modern" is the modern recipe for v5e-64, and ",modern" after a target that for another one.
    """
    c = paper_config("imagenet256", target, BATCH, paper_batch=256, mixture={"imagenet": 1.0})
    if split_target(target)[0] not in ("7b", "tiny"):
        c.data.max_seq_len = 512  # fits an image (256 patches) and its prompt
    return c
