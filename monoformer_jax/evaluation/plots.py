"""Matplotlib figures of a run: generated digits, generated pictures beside others, and its losses."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from matplotlib.figure import Figure


def digit_grid(images: np.ndarray, columns: int, names: tuple[str, ...]) -> Figure:
    """Digits [n, 8, 8, 1] in [-1, 1] as rows of `columns`; names[j] is the title of column j."""
    rows = len(images) // columns
    figure = Figure((columns * 0.75, rows * 0.75 + 0.4))
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.imshow(images[i, ..., 0], cmap="gray_r", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        if i < columns:
            axis.set_title(names[i], fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def comparison(names: Sequence[str], columns: Mapping[str, np.ndarray], note: str) -> Figure:
    """A row for each name, with a picture of every column.

    Args:
      columns: title -> pictures [n, h, w, 3] in [-1, 1].
      note: a line below them, such as their licence.
    """
    rows = len(names)
    figure = Figure((6.5, 0.8 * rows + 0.9))
    axes = figure.subplots(
        rows, 1 + len(columns), squeeze=False, width_ratios=[3.5] + [1] * len(columns)
    )
    for name, row in zip(names, axes):
        row[0].text(1, 0.5, name, ha="right", va="center", wrap=True, fontsize=9)
    for column, (title, pictures) in enumerate(columns.items(), 1):
        axes[0, column].set_title(title, fontsize=9)
        for axis, picture in zip(axes[:, column], pictures):
            axis.imshow(np.clip(picture / 2 + 0.5, 0, 1), interpolation="nearest")
    for axis in axes.flat:
        axis.axis("off")
    figure.subplots_adjust(0.01, 0.45 / (rows + 1), 0.99, 1 - 0.35 / (rows + 1), 0.1, 0.1)
    figure.text(0.01, 0.1 / (rows + 1), note, fontsize=6)
    return figure


def loss_curves(lines: Sequence[Mapping[str, float]]) -> Figure:
    """Training and held-out losses by step; with held-out images, also by noise level.

    Args:
      lines: the objects of metrics.jsonl.
    """
    levels = sorted({key for line in lines for key in line if key.startswith("val_image_loss_t")})
    figure = Figure((12 if levels else 8, 2.8))
    axes = figure.subplots(1, 3 if levels else 2)
    titles = {"text_loss": "next token, nats", "image_loss": "denoised image, mean squared error"}
    sets = {"": "training", "val_": "held out", "base_": "data of init_from"}
    for axis, (key, title) in zip(axes, titles.items()):
        for prefix, label in sets.items():
            _curve(axis, lines, prefix + key, label, "." if prefix else "")
        axis.set_title(title)
    for key in levels:
        _curve(axes[2], lines, key, f"t = {key.rpartition('_t')[2]}", ".")
    if levels:
        axes[2].set_title("held-out image by noise level")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _curve(axis, lines, key: str, label: str, marker: str) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axis.plot(*zip(*points), marker=marker, label=label)
        axis.set_yscale("log" if any(value > 0 for _, value in points) else "linear")


def to_picture(figure: Figure) -> PIL.Image.Image:
    """The figure as pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return PIL.Image.open(buffer)


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
