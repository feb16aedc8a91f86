"""report.html of a run: its figures, curves, samples by step, config and versions, in one file.

It is made from the files of the workdir alone, so a resumed run continues it.
"""

from __future__ import annotations

import html
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
import numpy as np
import PIL.Image
from etils import epath

import monoformer_jax
from monoformer_jax.evaluation import record
from monoformer_jax.evaluation.html import escape, image, is_page_of, table, write_page
from monoformer_jax.evaluation.plots import loss_curves, to_svg
from monoformer_jax.files import read_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_STEPS = 12  # whose samples are shown; all are in samples/
_ANSWERS = 4  # steps whose answers are shown
_EVALUATIONS = 20  # that are shown, the newest; all are in evaluations.jsonl
_WARNING = '<p class="warning">{}</p>'
_SIDE = 96  # of a sample, CSS pixels
_NAMES = {
    "val_loss": "held-out loss, weighted as in training",
    "val_text_loss": "held-out text, nats per token",
    "val_image_loss": "held-out images, mean squared error",
    "base_text_loss": "text of the data of init_from",
    "base_image_loss": "images of the data of init_from",
    "loss": "training loss",
    "text_loss": "training text",
    "image_loss": "training images",
    "step_ms": "ms per step",
    "tokens_per_s": "tokens/s",
    "images_per_s": "images/s",
    "data_wait_share": "share of time waiting for data",
    "memory_gib": "memory at the peak, GiB",
    "train_seconds": "seconds trained",
}


def add_evaluations(workdir: epath.Path) -> None:
    """Writes WORKDIR/report.html of a trained run anew, with its warnings, after an evaluation."""
    path = workdir / "report.html"
    if not (workdir / "metrics.jsonl").exists() or (
        path.exists() and not is_page_of(path, "train")
    ):
        return
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    write_report(workdir, [html.unescape(x) for x in re.findall(_WARNING.format("(.*?)"), page)])


def write_report(workdir: epath.Path, warnings: Sequence[str]) -> None:
    """Writes WORKDIR/report.html.

    Args:
      warnings: sentences that are shown at its top.
    """
    config = read_json(workdir / "config.json")
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    last = lines[-1]["step"] if lines else 0
    said = [_WARNING.format(escape(warning)) for warning in warnings]
    body = [
        f"<p>step {last} of {config['steps']}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, "
        f"{escape(workdir)}</p>",
        *said,
        _figures(lines),
        "<h2>Losses</h2>",
        to_svg(loss_curves(lines)),
        _evaluations(record.read(workdir)),
        _samples(workdir / "samples", last),
        _versions(),
        f"<h2>Config</h2><details><summary>config.json</summary><pre>"
        f"{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>",
    ]
    write_page(workdir / "report.html", f"Training of {config['name']}", "\n".join(body), "train")


def _figures(lines: Sequence[Mapping[str, float]]) -> str:
    """First, lowest and last value of every figure."""
    rows = []
    for key, name in _NAMES.items():
        values = {line["step"]: line[key] for line in lines if key in line}
        if not values:
            continue
        start = _number(values[0]) if 0 in values else "-"
        lowest = min(values, key=values.__getitem__)
        low = f"{_number(values[lowest])} at {lowest}" if key.endswith("loss") else "-"
        now = values[max(values)]
        change = f"{now / values[0] - 1:+.1%}" if values.get(0) else "-"
        rows.append((escape(name), start, low, _number(now), change))
    head = ("", "step 0", "lowest, at step", "now", "change since step 0")
    return "<h2>Figures</h2>" + table(head, rows, numbers=True)


def _evaluations(lines: Sequence[Mapping]) -> str:
    """What `evaluate` measured, the newest first, and what it stands on."""
    rows = []
    for line in lines[-_EVALUATIONS:][::-1]:
        scores, facts = line["scores"], line["provenance"]
        figures = []
        for key, value in scores.items():
            spread = scores.get(f"{key}_spread")
            said = _number(value) if spread is None else f"{_number(value)} ± {_number(spread)}"
            figures += [] if key.endswith("_spread") else [f"{escape(key)} {said}"]
        of = [f"{escape(key)} {escape(value)}" for key, value in facts.items()]
        rows.append((escape(line["time"]), "<br>".join(figures), "<br>".join(of)))
    return "<h2>Evaluations</h2>" + table(("time", "figures", "of"), rows) if rows else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _samples(folder: epath.Path, last: int) -> str:
    found = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit())
    records = {step: read_json(folder / f"{step}.json") for step in found if step <= last}
    if not records:
        return ""
    newest = records[max(records)]
    return "\n".join(_drawn(folder, records, newest) + _read(folder, records, newest))


def _drawn(folder: epath.Path, records: Mapping[int, dict], newest: dict) -> list[str]:
    """The grids of some steps side by side; a resumed run may have changed its prompts."""
    steps = [step for step, record in records.items() if record["prompts"] == newest["prompts"]]
    if not newest["prompts"]:
        return []
    columns = {str(step): _tiles(folder / f"{step}.png") for step in _spread(steps, _STEPS)}
    if newest["held_out"]:
        columns["held out"] = _tiles(folder / "held_out.png")
    rows = [
        (escape(prompt), *(tiles[number] for tiles in columns.values()))
        for number, prompt in enumerate(newest["prompts"])
    ]
    note = '<p class="note">The same prompts and the same noise at every step.</p>'
    return ["<h2>Drawn</h2>", note, table(("prompt", *columns), rows)]


def _read(folder: epath.Path, records: Mapping[int, dict], newest: dict) -> list[str]:
    """The answers of some steps beside the held-out ones."""
    if not newest["questions"]:
        return []
    same = [step for step, r in records.items() if r["questions"] == newest["questions"]]
    steps = _spread(same, _ANSWERS)
    pictures = _tiles(folder / "read.png")
    rows = [
        (picture, escape(prompt), escape(answer),
         *(escape(records[step]["answers"][number]) for step in steps))
        for number, (picture, (prompt, answer)) in enumerate(zip(pictures, newest["questions"]))
    ]  # fmt: skip
    head = ("", "prompt", "held-out answer", *(f"step {step}" for step in steps))
    return ["<h2>Read</h2>", table(head, rows)]


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Up to `most` of the steps, with the first and the last."""
    places = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
    return [steps[place] for place in places]


def _tiles(path: epath.Path) -> list[str]:
    """The squares of a column of pictures."""
    with path.open("rb") as file:
        strip = PIL.Image.open(file).copy()
    side = strip.width
    return [
        image(strip.crop((0, top, side, top + side)), _SIDE) for top in range(0, strip.height, side)
    ]


def _versions() -> str:
    rows = [("monoformer_jax", escape(monoformer_jax.__version__))]
    rows += [(escape(name), escape(metadata.version(name))) for name in _PACKAGES]
    devices = jax.devices()
    rows += [
        ("Python", escape(platform.python_version())),
        ("devices", escape(f"{len(devices)} × {devices[0].device_kind}")),
        ("processes", str(jax.process_count())),
    ]
    return "<h2>Versions</h2>" + table(("", ""), rows)
