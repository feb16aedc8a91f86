"""One transformer that writes text and paints images: MonoFormer (arXiv 2409.16280) in JAX/Flax."""

__version__ = "0.1.0"
