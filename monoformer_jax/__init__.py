"""MonoFormer (arXiv 2409.16280) in JAX/Flax: one transformer that generates text and images.

model = monoformer_jax.load("runs/digits")
model.generate_images(["draw a seven"])
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["InputError", "Model", "load"]

if TYPE_CHECKING:
    from monoformer_jax.api import Model, load
    from monoformer_jax.errors import InputError
else:

    def __getattr__(name: str):
        # Importing jax takes seconds, so the public API is imported on first use.
        if name == "InputError":
            from monoformer_jax.errors import InputError

            return InputError
        if name in ("Model", "load"):
            from monoformer_jax import api

            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted([*globals(), *__all__])
