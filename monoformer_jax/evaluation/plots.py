"""Matplotlib figures of a run: a labelled grid of generated digits, and the loss curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from monoformer_jax.errors import InputError


def save_digit_grid(path: Path, images: np.ndarray, columns: int, names: tuple[str, ...]) -> None:
    """Saves digits [n, 8, 8, 1] in [-1, 1] as rows of `columns`; names[j] is the title of column j."""
    plt = _pyplot()
    rows = len(images) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.75, rows * 0.75 + 0.4))
    for i, axis in enumerate(axes.flat):
        axis.imshow(images[i, ..., 0], cmap="gray_r", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        if i < columns:
            axis.set_title(names[i], fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_loss_curves(path: Path, metrics_file: Path) -> None:
    """Plots text and image loss by step from the metrics.jsonl of a run."""
    plt = _pyplot()
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    named = (("text_loss", "next token, nats"), ("image_loss", "velocity, mean squared error"))
    for axis, (key, title) in zip(axes, named):
        losses = [line[key] for line in lines]
        axis.plot(steps, losses)
        axis.set(title=title, xlabel="step", yscale="log" if any(losses) else "linear")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the figures need matplotlib: pip install -e '.[digits]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
