"""Transfusion's recipe (arXiv 2408.11039), from random weights: half of the tokens text, half images.

    python -m monoformer_jax.prepare_data --from=text.jsonl --to=records/text
    python -m monoformer_jax.prepare_data --from=captions.jsonl --codec=sd_vae --vae=VAE \\
        --to=records/captions
    python -m monoformer_jax.train --config=configs/transfusion_7b.py --workdir=runs/transfusion_7b
    python -m monoformer_jax.sample --workdir=runs/transfusion_7b --vae=VAE --paint \\
        --prompt="a lighthouse in a storm" --out=lighthouse.png

Text as {"text": …} and captioned images as {"image": …, "caption": …}; a tokenizer.json of 32,000
tokens and the four special ones (docs/your-data.md). VAE is the folder of an autoencoder with latents
of 8 channels, 32×32 for 256 pixels, as the paper trained; with one of 4 channels, such as Stable
Diffusion's, add --config.model.channels=4. It has not been run at any of these sizes.

What the paper says: parameter counts, AdamW, warm-up, schedule of the learning rate, clipping, rows
of 4,096 tokens, 2 T of them, weight 5 of the image loss, DDPM with the cosine schedule, U-Net
around patches of 2×2, captions first in 80 % of the pairs and at most half of the noise where the
image is first, 250 steps with guidance 5. Chosen here: layers and widths, 1,024 rows a step, a
moving average of the weights, 10 % of the prompts dropped for guidance, one document of text for
three of pictures. Other choices are overrides:

    --config.data.image_first=0.5                                  as many captions behind as before
    --config.objective.noise_limit=1 --config.data.noised_copies=True \\
        --config.data.clean_images=0.1                                       captions see clean images
    --config.objective.kind=rectified_flow --config.objective.beta_schedule=linear \\
        --config.sampling.solver=heun --config.sampling.steps=50                    flow instead of DDPM
    --config.model.patch_codec=linear --config.model.max_patches=0                   no U-Net

`plan` with rows of images behind short prompts (compiled, never run), 7,121 M parameters:

    chips     --topology   peak a chip           predicted step   useful MFU
    v5e-256   v5e:16x16     9.495 GiB, 40% free        7,093 ms          46%
    v5p-128   v5p:4x4x4    33.244 GiB, 65% free       11,471 ms          49%
"""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size

# Rows per step; the smaller ones have half of the tokens, for the half of a trillion of the ablations.
ROWS = {"7b": 1024, "1.4b": 512, "0.76b": 512, "0.37b": 512, "0.16b": 512, "tiny": 4}


def get_config(size: str = "7b"):
    """`size` is "7b", "1.4b", "0.76b", "0.37b" or "0.16b", or "tiny", a test."""
    require(size in ROWS, f"there is no size {size!r}; there are {', '.join(ROWS)}")
    c = base_config()
    c.name = f"transfusion_{size}"
    c.model.update(named_size(c.name if size != "tiny" else "tiny"))
    c.batch_size = ROWS[size]
    c.steps = 476_800 if size == "7b" else 238_400  # 2 T and 0.5 T tokens
    c.checkpoint_every, c.log_every = 5000, 100
    c.model.update(patch_codec="unet", max_patches=256, codec_dim=1024)
    c.model.remat = "nothing_saveable"
    c.objective.update(kind="ddpm", beta_schedule="cosine", noise_limit=0.5)
    c.loss.update(text_weight=1.0, image_weight=5.0)
    # By documents: a caption with its image has about 300 tokens, a text about 900.
    c.data.mixture = {"text": 0.25, "captions": 0.75}
    c.data.records = {source: f"records/{source}" for source in c.data.mixture}
    c.data.update(
        tokenizer="tokenizer.json", image_size=32, max_seq_len=4096, sample_latents=True,
        prompt_dropout=0.1, image_first=0.2,
    )  # fmt: skip
    c.optimizer.update(
        learning_rate=3e-4, schedule="cosine", final_fraction=0.05, warmup_steps=4000, b1=0.9,
        b2=0.95, weight_decay=0.1, clip_norm=1.0, ema_decay=0.9999,
    )  # fmt: skip
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.sampling.update(solver="ddpm", steps=250, guidance=5.0)
    if size == "tiny":
        c.model.update(vocab_size=262, channels=1, max_patches=16, codec_dim=8, codec_blocks=1)
        c.data.update(tokenizer="bytes", image_size=8, max_seq_len=160, sample_latents=False)
        c.data.mixture, c.data.records = {"draw": 0.7, "say": 0.3}, {}
        c.steps, c.log_every, c.checkpoint_every, c.optimizer.warmup_steps = 20, 1, 10, 2
    return c
