"""Class-conditional ImageNet at 256 pixels, on latents: the model of the paper's first table.

    python -m monoformer_jax.convert --from=TinyLlama-1.1B-Chat-v1.0 --to=runs/tinyllama
    python -m monoformer_jax.prepare_data --from=imagenet/train --labels=labels.json \\
        --codec=sd_vae --vae=sd-vae-ft-mse --to=records/imagenet
    python -m monoformer_jax.train --config=configs/imagenet256.py:v5e-64 --workdir=runs/imagenet256 \\
        --config.init_from=runs/tinyllama
    python -m monoformer_jax.sample --workdir=runs/imagenet256 --vae=sd-vae-ft-mse --paint \\
        --prompt="an image of goldfish." --out=goldfish.png
    python -m monoformer_jax.prepare_data --from=imagenet/val --labels=labels.json \\
        --codec=sd_vae --vae=sd-vae-ft-mse --to=records/imagenet_val
    python -m monoformer_jax.evaluate --workdir=runs/imagenet256 --records=records/imagenet_val
    python -m monoformer_jax.convert --from=runs/imagenet256 --to=export --check

On a slice, launch/tpu.sh starts `train`, with folders on gs:// (docs/tpu.md). The last command writes
the original's format.

TinyLlama's size and weights, 32×32×4 latents of Stable Diffusion's autoencoder in 256 patches, rows of
2176 tokens with eight images each. EMA, clipping and loss weights are the original's, and so are the
256 images a step, the learning rate and the steps of `:paper`, for v5e-32; `paper_config` in common.py
has the rule for larger batches. `:modern` has today's recipe (`modern_recipe` in common.py, with the
source of each value); the original trained DDPM, which is --config.objective.kind=ddpm
--config.objective.learn_sigma=True --config.sampling.solver=ddpm. It has not been run at this size.

`python -m monoformer_jax.plan --config=configs/imagenet256.py --topology=v5e:8x8` (nothing was timed;
the rows are of documents as long as ImageNet's, see tests/stand_in.py):

    imagenet256 on v5e:8x8: 1,122.1 M parameters, 64 devices, mesh data=1, fsdp=64, tensor=1, train
    memory of a device, GiB
      arguments       0.320
      temporaries     3.543
      peak            3.802
      HBM            15.750   76% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      all-reduce          fsdp            213      4433.5
      all-gather          fsdp            325      4009.9
      all-to-all          fsdp             10        17.8
    a step takes at least the largest of three, ms
      compute      64.21   products of the blocks at 197 TFLOP/s in bfloat16
      HBM         0.8382   state read and written once at 819 GB/s
      ICI          84.61   collectives over the links that each can use, at full speed
    model FLOPs of a step: 9.464e+14
      at 40% of peak: 187.7 ms a step, 742,140 tokens/s, up to 2,728 images/s, 250,000 steps in 13.0 h
      at 50% of peak: 150.1 ms a step, 927,675 tokens/s, up to 3,411 images/s, 250,000 steps in 10.4 h
    hosts: 16, streams: 16
      at 50% of peak a host must make 4 rows in 150.1 ms: 213 images/s
      packed rows: 99% real tokens, 8.00 images
    predicted step, ms: 145.6   from the schedule; nothing was timed
      backward           59.93
      forward            26.81
      attention          10.49
      scan                8.91
      relayouts           5.38
      norm                5.18
      other               4.27
      heads               1.31
      optimizer           1.24
      rope                0.96
      text_loss           0.63
      fills               0.00
      exposed ICI        20.49   4.91 synchronous
    collectives by exposed time: kind, mesh axes, largest array, runs, MB, GB/s, ms, exposed
      all-reduce     fsdp      f32[2048,32128]       1     518.2   100    5.18    5.17  beside optimizer
      all-gather     fsdp      bf16[2048,32128]      1     129.5   100    1.30    1.29  beside other
      all-reduce     fsdp      bf16[5632,2048]       2      90.8   100    0.91    0.91  synchronous
      all-gather     fsdp      bf16[1,5632,2048]     2      45.4   100    0.45    0.45  synchronous
      all-reduce     fsdp      bf16[2048,5632]       2      90.8   100    0.91    0.37  beside backward
      all-reduce     fsdp      bf16[5632,2048]       2      90.8   100    0.91    0.33  beside backward
      all-reduce     fsdp      bf16[2048,4096]       1      33.0   100    0.33    0.32  beside other
      all-reduce     fsdp      bf16[5632,2048]       2      90.8   100    0.91    0.26  beside backward
    useful: MFU 44.6%, 942,829 tokens/s, 3,516 images/s, of 99% real tokens
      250,000 steps in 10.1 h

The 7 B model, `--config=configs/imagenet256.py:7b --topology=v5e:16x16`: peak 7.426 GiB a chip,
53% free, predicted step 1,649 ms, useful MFU 46.9%.
"""

from common import paper_config

# Rows per step, and tokens per row. A document has 268 tokens in the mean: eight fill a row. About one
# row a chip, which hides the collectives of the weights behind the matrix products; v6e computes 4.7
# times as fast with links that are twice as fast. See `paper_config` for learning rate and steps.
ROWS = {"v5e-64": (64, 2176), "v6e-64": (128, 2176), "v5e-256": (256, 2176), "paper": (32, 2176),
        "7b": (256, 4096), "tiny": (8, 64)}  # fmt: skip


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "paper", its 256 images a step, for v5e-32;
    "7b", for v5e-256; or "tiny", a test.

    "modern" is the modern recipe for v5e-64, and ",modern" after a target that for another one.
    """
    return paper_config(
        "imagenet256", target, {"imagenet": 1.0}, rows=ROWS, document=268, paper_batch=256
    )  # fmt: skip
