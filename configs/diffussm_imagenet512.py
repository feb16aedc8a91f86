"""DiffuSSM-XL at 512 pixels: `diffussm_imagenet256.py` on 64×64×4 latents, sequences of 4096.

    python -m monoformer_jax.train --config=configs/diffussm_imagenet512.py --workdir=gs://…

302 million images, 1.18 million steps of 256, as in the paper. It has not been run at this size.

`python -m monoformer_jax.plan --config=configs/diffussm_imagenet512.py --topology=v5e:4x4` (nothing
was timed):

    diffussm_imagenet512 on v5e:4x4: 668.8 M parameters, 16 devices, mesh data=1, fsdp=16, tensor=1,
            train
    memory of a device, GiB
      arguments       0.764
      temporaries     7.337
      peak            7.718
      HBM            15.750   51% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      all-gather          fsdp            389      1756.6
      collective-permute  fsdp           1890       769.7
      all-reduce          fsdp            356       370.7
      all-to-all          fsdp              5         0.2
    a step takes at least the largest of three, ms
      compute      748.4   products of the blocks at 197 TFLOP/s in bfloat16
      HBM          1.998   state read and written once at 819 GB/s
      ICI          36.67   collectives over the links that each can use, at full speed
    model FLOPs of a step: 1.830e+15
      at 40% of peak: 1452 ms a step, 727,964 tokens/s, up to 176 images/s, 1,179,688 steps in 475.7 h
      at 50% of peak: 1161 ms a step, 909,955 tokens/s, up to 220 images/s, 1,179,688 steps in 380.6 h
    hosts: 4, streams: 64
      at 50% of peak a host must make 64 rows in 1161 ms: up to 55 images/s
      real tokens are not known: the records or the tokenizer are not here
    predicted step, ms: 5616.4   from the schedule; nothing was timed
      other            2668.72
      relayouts        1494.06
      backward          618.12
      forward           405.51
      recomputation     389.57
      scan               28.71
      optimizer           3.01
      heads               0.79
      fills               0.07
      exposed ICI         7.83   6.54 synchronous
    collectives by exposed time: kind, mesh axes, largest array, runs, MB, GB/s, ms, exposed
      all-reduce     fsdp      bf16[1152,2304]      29     288.6   100    2.89    2.89  synchronous
      all-gather     fsdp      bf16[1,1152,2304]    29     144.3   100    1.44    1.44  synchronous
      all-gather     fsdp      bf16[1,1152,2304]    29     144.3   100    1.44    1.44  synchronous
      collective-permute fsdp      bf16[2,2,1152,72]    29      19.2    50    0.38    0.58  beside other
      all-gather     fsdp      bf16[1,1152,1152]    29      72.2   100    0.72    0.31  beside other
      collective-permute fsdp      bf16[2304,72]        29       9.6    50    0.19    0.19  beside
            relayouts
      collective-permute fsdp      bf16[72,2304]        29       9.6    50    0.19    0.19  beside other
      all-reduce     fsdp      f32[2,1152,32]       29      16.0   100    0.16    0.16  synchronous
    useful: MFU 10.3%, 187,611 tokens/s, 46 images/s, of 100% real tokens (rows of images with short
            prompts are assumed)
      1,179,688 steps in 1,840.4 h

Compute counts the dense products and their recomputation; the convolutions, in the form "chunked" on
TPU, add 6 % to the dense products (docs/backbones.md).
"""

from diffussm_imagenet256 import get_config as at_256


def get_config(target: str = "v5e-16"):
    """`target` is "v5e-16" or "tiny", a test."""
    return at_256(target, side=64, images=302e6)
