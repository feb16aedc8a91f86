"""evaluations.jsonl of a run: what was measured, when, and what every figure stands on.

Each line is an object: "time", "scores" (figures, with KEY_spread where there are several seeds) and
"provenance" (extractor, hashes and counts, checkpoint, solver, steps, guidance, seeds, …).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from monoformer_jax.errors import InputError
from monoformer_jax.files import atomic_write, read_json

_FILE = "evaluations.jsonl"
_SAMPLING = ("solver", "steps", "guidance", "guidance_low", "guidance_high", "guidance_rescale")


def sampling_facts(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config's `sampling` that decide a score, by names of their own."""
    facts = {name: sampling[name] for name in _SAMPLING if name in sampling}
    return {{"steps": "sampling_steps"}.get(name, name): value for name, value in facts.items()}


def made_by_sample(source: epath.Path) -> dict[str, Any]:
    """How `sample` made a folder of pictures or a samples.npz; {} if it did not, or says nothing."""
    folder = source if source.is_dir() else source.parent
    for path in (folder / "samples.json", folder / "sampling.json"):
        if source.is_dir() != (path.name == "samples.json") or not path.exists():
            continue
        try:
            facts = read_json(path)
            of_run = {"workdir": facts["workdir"], "checkpoint_step": facts["step"], "ema": True}
            return of_run | {"seed": facts["seed"]} | sampling_facts(facts["config"]["sampling"])
        except (InputError, KeyError, TypeError, AttributeError):
            return {}  # another program's file of that name
    return {}


def with_spread(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure, and KEY_spread, their standard deviation, if there are several."""
    found = {}
    for key in scores[0]:
        values = [one[key] for one in scores]
        found[key] = float(np.mean(values))
        if len(values) > 1:
            found[f"{key}_spread"] = float(np.std(values, ddof=1))
    return found


def common(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One fact of several sets where they agree, and the list of all where they do not."""
    found = {}
    for key in facts[0]:
        values = [one.get(key) for one in facts]
        found[key] = values[0] if all(value == values[0] for value in values) else values
    return found


def append(workdir: epath.Path, scores: Mapping[str, float], provenance: Mapping[str, Any]) -> None:
    """Adds a line to the file of a run; the lines before it are kept."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "scores": scores,
        "provenance": provenance,
    }
    path = workdir / _FILE
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    before += "" if before.endswith("\n") or not before else "\n"
    with atomic_write(path) as file:
        file.write_text(f"{before}{json.dumps(line, ensure_ascii=False)}\n", encoding="utf-8")


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of a run, oldest first, without damaged ones; [] if nothing was measured."""
    path, found = workdir / _FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    keys = {"time", "scores", "provenance"}
    return [line for line in found if isinstance(line, dict) and line.keys() >= keys]
