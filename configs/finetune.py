"""LoRA fine-tuning on your own images on one 16 GB chip, from a TinyLlama-size image model.

    python -m monoformer_jax.convert --from=MonoFormer_ImageNet_256 --to=runs/imagenet --check
    python -m monoformer_jax.prepare_data --from=pictures/captions.jsonl --to=records/pictures \\
        --codec=sd_vae --vae=sd-vae-ft-mse
    python -m monoformer_jax.train --config=configs/finetune.py:runs/imagenet --workdir=runs/pictures \\
        --config.data.validation_split=0.1
    python -m monoformer_jax.evaluate --workdir=runs/pictures --json=losses.json
    python -m monoformer_jax.sample --workdir=runs/pictures --vae=sd-vae-ft-mse --paint \\
        --prompt="a red chair" --out=chair.png
    python -m monoformer_jax.convert --from=runs/pictures --to=runs/merged --format=orbax
    python -m monoformer_jax.convert --from=runs/pictures --to=export --check

The last two merge the adapters: into a workdir, and into the original's format.
"""

import json
from pathlib import Path

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size


def get_config(base: str = ""):
    """`base` is the workdir to start from; default: the config of the released weights."""
    c = base_config()
    if base:
        exists = (Path(base) / "config.json").is_file()
        require(
            exists,
            f"{base} is not a workdir to start from: `convert` makes one from released weights",
        )
        c.update(json.loads((Path(base) / "config.json").read_text(encoding="utf-8")))
    else:
        c.model.update(named_size("tinyllama_1b"))
        c.objective.learn_sigma = True
        c.model.original.context_images = "causal"
        c.objective.kind = "ddpm"
        c.sampling.solver = "ddpm"
        c.sampling.guidance_channels = "first_three"
        c.data.max_seq_len = 512
        c.data.image_size = 32
        c.data.tokenizer = "tokenizer.json"
    c.name = "finetune"
    c.init_from = base or "runs/imagenet"
    c.lora.rank = 16
    c.steps = 1000
    c.batch_size = 8
    c.data.streams = 0  # that of the base divides another batch_size
    c.checkpoint_every = 250
    c.loss.text_beside_images = True
    c.data.mixture = {"pictures": 1.0}
    c.data.records = {"pictures": "records/pictures"}
    c.data.sample_latents = True
    c.optimizer.restart_step = 0
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "constant"
    c.optimizer.weight_decay = 0.0
    return c
