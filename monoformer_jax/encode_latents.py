"""The former name of `prepare_data`; says so and ends."""

from __future__ import annotations

import sys

from monoformer_jax.cli import renamed
from monoformer_jax.errors import BAD_INPUT

if __name__ == "__main__":
    renamed("encode_latents")
    sys.exit(BAD_INPUT)
