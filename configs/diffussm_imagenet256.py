"""DiffuSSM-XL: class-conditional ImageNet at 256 pixels, on latents, without attention.

    python -m monoformer_jax.train --config=configs/diffussm_imagenet256.py --workdir=gs://…

The paper's model and recipe (arXiv 2311.18257): 29 layers of width 1152, the 32×32×4 latents of
Stable Diffusion's autoencoder as a sequence of 1024, DDPM with learned variance, 256 images a step,
learning rate 1e-4, no weight decay, EMA 0.9999; 660 million images are 2.58 million steps. Sampling:
250 DDPM steps, with the guidance 1.5 of DiT, as the paper's is not known. classes.json is a tokenizer
with one token per class, see docs/backbones.md. It has not been run at this size.
"""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size


def get_config(target: str = "v5e-16", side: int = 32, images: float = 660e6):
    """`target` is "v5e-16" or "tiny", a test; `side` of the latents; `images` that are seen."""
    require(target in ("v5e-16", "tiny"), f"there is no target {target!r}; there are v5e-16, tiny")
    c = base_config("diffussm")
    c.name = f"diffussm_imagenet{8 * side}"
    c.batch_size = 256
    c.steps = round(images / c.batch_size)
    c.checkpoint_every = 5000
    c.log_every = 100
    c.model.update(named_size("xl", "diffussm"))
    c.model.max_patches = side**2
    c.objective.update(kind="ddpm", learn_sigma=True)
    c.data.mixture = {"imagenet": 1.0}
    c.data.records = {"imagenet": "records/imagenet"}
    c.data.update(sample_latents=True, tokenizer="classes.json", image_size=side,
                  max_seq_len=side**2 + 32)  # fmt: skip
    c.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999,
                       weight_decay=0.0, ema_decay=0.9999)  # fmt: skip
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.sampling.update(solver="ddpm", steps=250, guidance=1.5)
    if target == "tiny":
        c.model.update(named_size("tiny", "diffussm"), vocab_size=262, max_patches=64)
        c.data.update(tokenizer="bytes", image_size=8, max_seq_len=128)
        c.batch_size, c.steps, c.log_every, c.checkpoint_every = 8, 20, 1, 10
    return c
