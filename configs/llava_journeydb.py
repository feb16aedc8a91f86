"""Visual question answering and text-to-image: LLaVA's instructions and JourneyDB, one to one.

    python -m monoformer_jax.convert --from=TinyLlama-1.1B-Chat-v1.0 --to=runs/tinyllama
    python -m monoformer_jax.prepare_data --from=llava/llava_v1_5_mix665k.json --ignore=model \\
        --codec=sd_vae --vae=sd-vae-ft-mse --to=records/llava
    python -m monoformer_jax.prepare_data --from=journeydb/train_anno_realease_repath.jsonl \\
        --ignore=Task1,Task2,Task3 --codec=sd_vae --vae=sd-vae-ft-mse --to=records/journeydb
    python -m monoformer_jax.train --config=configs/llava_journeydb.py:v5e-64 \\
        --workdir=runs/llava_journeydb --config.init_from=runs/tinyllama
    python -m monoformer_jax.sample --workdir=runs/llava_journeydb --vae=sd-vae-ft-mse --paint \\
        --prompt="Please generate an image of a lighthouse in a storm" --out=lighthouse.png
    python -m monoformer_jax.prepare_data --from=journeydb/valid_anno_repath.jsonl \\
        --ignore=Task1,Task2,Task3 --codec=sd_vae --vae=sd-vae-ft-mse --to=records/journeydb_val
    python -m monoformer_jax.evaluate --workdir=runs/llava_journeydb --records=records/journeydb_val
    python -m monoformer_jax.convert --from=runs/llava_journeydb --to=export --check

On a slice, launch/tpu.sh starts `train`, with folders on gs:// (docs/tpu.md). The last command writes
the original's format.

TinyLlama's size and weights; conditioning and generated images are the same 32×32×4 latents of Stable
Diffusion's autoencoder, clean or noised. Rows of 2048 tokens with five documents each. EMA, clipping,
mixture and loss weights are the original's. `:paper`, for v5e-32, has 128 documents a step with the
original's learning rate and steps; `paper_config` in common.py has the rule for larger batches.
`:modern` has today's recipe (`modern_recipe` in common.py, with the source of each value). It has not
been run at this size.

`python -m monoformer_jax.plan --config=configs/llava_journeydb.py --topology=v5e:8x8` (nothing was
timed; the rows are of documents as long as those of the data sets, see tests/stand_in.py):

    llava_journeydb on v5e:8x8: 1,122.1 M parameters, 64 devices, mesh data=1, fsdp=64, tensor=1, train
    memory of a device, GiB
      arguments       0.320
      temporaries     3.331
      peak            3.687
      HBM            15.750   77% free
    collectives of a step: kind, mesh axes, runs, MB that a device sends
      all-reduce          fsdp            213      4433.5
      all-gather          fsdp            325      4009.1
      all-to-all          fsdp             10        16.7
    a step takes at least the largest of three, ms
      compute      60.43   products of the blocks at 197 TFLOP/s in bfloat16
      HBM         0.8382   state read and written once at 819 GB/s
      ICI          84.59   collectives over the links that each can use, at full speed
    model FLOPs of a step: 8.862e+14
      at 40% of peak: 175.7 ms a step, 745,938 tokens/s, up to 2,550 images/s, 200,000 steps in 9.8 h
      at 50% of peak: 140.6 ms a step, 932,423 tokens/s, up to 3,187 images/s, 200,000 steps in 7.8 h
    hosts: 16, streams: 16
      at 50% of peak a host must make 4 rows in 140.6 ms: 143 images/s
      packed rows: 100% real tokens, 5.02 images
    predicted step, ms: 138.9   from the schedule; nothing was timed
      backward           50.01
      forward            25.48
      attention          10.91
      scan                8.25
      relayouts           6.80
      norm                4.82
      other               4.13
      heads               1.30
      optimizer           1.24
      text_loss           0.63
      rope                0.07
      exposed ICI        25.22   4.06 synchronous
    collectives by exposed time: kind, mesh axes, largest array, runs, MB, GB/s, ms, exposed
      all-reduce     fsdp      f32[2048,32128]       1     518.2   100    5.18    5.17  beside optimizer
      all-gather     fsdp      bf16[2048,32128]      1     129.5   100    1.30    1.29  beside other
      all-reduce     fsdp      bf16[5632,2048]       2      90.8   100    0.91    0.91  synchronous
      all-gather     fsdp      bf16[1,5632,2048]     2      45.4   100    0.45    0.45  synchronous
      all-reduce     fsdp      bf16[2048,5632]       2      90.8   100    0.91    0.40  beside backward
      all-reduce     fsdp      bf16[2048,5632]       2      90.8   100    0.91    0.40  beside backward
      all-reduce     fsdp      bf16[2048,5632]       2      90.8   100    0.91    0.40  beside backward
      all-reduce     fsdp      bf16[2048,5632]       2      90.8   100    0.91    0.40  beside backward
    useful: MFU 45.7%, 943,831 tokens/s, 2,312 images/s, of 100% real tokens
      200,000 steps in 7.7 h
"""

from common import paper_config

# Rows per step, and tokens per row, with four or five documents of about 400 tokens. See imagenet256.py
# for the rows of a chip, and `paper_config` for learning rate and steps. The original has 16 documents
# a step, too few for the rule: it starts from the 128 of journeydb_ultrachat.py.
ROWS = {"v5e-64": (64, 2048), "v6e-64": (128, 2048), "v5e-256": (256, 2048), "paper": (32, 1664),
        "7b": (256, 4096), "tiny": (8, 64)}  # fmt: skip


def get_config(target: str = "v5e-64"):
    """`target` is a slice, "v5e-64", "v5e-256" or "v6e-64"; "paper", 128 documents a step, for
    v5e-32; "7b", for v5e-256; or "tiny", a test.

    "modern" is the modern recipe for v5e-64, and ",modern" after a target that for another one.
    """
    return paper_config(
        "llava_journeydb", target, {"llava": 0.5, "journeydb": 0.5},
        rows=ROWS, document=400, paper_batch=128,
    )  # fmt: skip
