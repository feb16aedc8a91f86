"""One transformer that writes text and paints images: MonoFormer (arXiv 2409.16280) in JAX/Flax.

model = monoformer_jax.load("runs/digits")
model.generate_images(["draw a seven"])
"""

__version__ = "0.1.0"
__all__ = ["InputError", "Model", "load"]


def __getattr__(name: str):
    # Loading jax takes seconds, so it waits until something is asked for.
    if name == "InputError":
        from monoformer_jax.errors import InputError

        return InputError
    if name in ("Model", "load"):
        from monoformer_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
