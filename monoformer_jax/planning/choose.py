"""The remat set, mesh and rows a chip with the least predicted time that fit a slice.

The result is written as config values and never chosen when a run starts, so that a resumed run does
not depend on it. Each candidate is a compilation; results are kept in a file, so that a search that is
repeated or enlarged compiles only what is new.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import monoformer_jax
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import read_json, write_json
from monoformer_jax.models import make_config

SPARE = 0.9  # share of HBM that a choice may use
# From what recomputes least to what needs least memory.
REMATS = (
    "save_names:qkv,attention_out,residual,mlp_hidden",
    "save_names:qkv,attention_out,residual",
    "save_names:attention_out",
    "nothing_saveable",
)
KEYS = ("peak_gib", "hbm_gib", "predicted_step_ms", "exposed_collective_ms")

Values = Mapping[str, Any]  # of `Config.to_dict`
Change = dict[str, int | str]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Config values that differ from those of the run, and what the compiler says of them.

    Attributes:
      found: the `KEYS` of the JSON of `plan`; without a predicted step if it does not fit.
    """

    change: Change
    batch_size: int
    found: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.found["peak_gib"] <= SPARE * self.found["hbm_gib"]

    @property
    def ms_per_row(self) -> float:
        return self.found["predicted_step_ms"] / self.batch_size


def candidates(config: Values, chips: int, rows: Sequence[int]) -> Iterator[Change]:
    """Changes of the config, the most promising first.

    Args:
      rows: rows a chip to try; empty: only those of the config.
    """
    meshes: list[Change] = [{}, *(
        {"mesh.data": data, "mesh.fsdp": -1, "mesh.tensor": tensor}
        for data, tensor in ((1, 1), (2, 1), (1, 2))
    )]  # fmt: skip
    batches: list[Change] = [{"batch_size": n * chips} for n in rows] or [{}]
    seen = []
    for mesh, batch, remat in itertools.product(meshes, batches, REMATS):
        change = mesh | batch | {"model.remat": remat}
        made = with_values(config, change)
        if made not in seen:
            seen.append(made)
            yield change


def with_values(config: Values, change: Change):
    """The `Config` with some values replaced, by dotted key."""
    values = copy.deepcopy(config)
    for key, value in change.items():
        *groups, name = key.split(".")
        group = values
        for one in groups:
            group = group[one]
        group[name] = value
    return make_config(values)


def arguments(change: Change) -> list[str]:
    """The change as command-line arguments."""
    return [f"--config.{key}={value}" for key, value in change.items()]


def search(
    config: Values,
    changes: Sequence[Change],
    topology: str,
    *,
    estimate: Callable[[Any], dict],
    cache: Path,
    minutes: float,
) -> list[Candidate]:
    """Compiles the changes, or takes them from the cache.

    Args:
      estimate: returns the JSON of `plan` for a config.
      cache: file of earlier results; created if there is none.
      minutes: time of the search.

    Raises:
      InputError: after the first compilation, if those that are left would take longer.
    """
    known = read_json(cache) if cache.is_file() else {}
    results, begin, compiled = [], time.monotonic(), 0
    keys = [_key(with_values(config, change), topology) for change in changes]
    for number, (change, key) in enumerate(zip(changes, keys, strict=True)):
        text = " ".join(arguments(change))
        if key not in known:
            try:
                found = estimate(with_values(config, change))
            except InputError as error:
                print(f"  invalid: {text}: {error}", flush=True)
                continue
            known[key] = {name: found[name] for name in KEYS if name in found}
            write_json(cache, known)
            compiled += 1
        one = Candidate(change, with_values(config, change).batch_size, known[key])
        results.append(one)
        step = one.found.get("predicted_step_ms")
        verdict = f"{step:.1f} ms" if step else "too large"
        print(f"  {verdict:>10}  {one.found['peak_gib']:6.2f} GiB  {text}", flush=True)
        left = sum(key not in known for key in keys[number + 1 :])
        need = left * (time.monotonic() - begin) / 60 / max(compiled, 1)
        used = (time.monotonic() - begin) / 60
        require(
            used + need <= minutes or not left,
            f"--search: {left} more compilations take about {need:.0f} minutes after {used:.0f}, and "
            f"--minutes is {minutes:g}; {cache} keeps what is compiled",
        )
    return results


def choose(results: Sequence[Candidate]) -> Candidate:
    """The candidate with the least predicted time a row that leaves a tenth of the memory free.

    Raises:
      InputError: there is none.
    """
    fitting = [one for one in results if one.fits and "predicted_step_ms" in one.found]
    require(
        bool(fitting),
        f"none of {len(results)} candidates leaves {1 - SPARE:.0%} of HBM free: use a larger slice, "
        "fewer rows a chip or a larger --search",
    )
    return min(fitting, key=lambda one: one.ms_per_row)


def _key(config: Any, topology: str) -> str:
    """What a result depends on: the config, the slice, the compiler and this code."""
    package = Path(monoformer_jax.__file__).parent
    content = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    content.update(json.dumps([config.to_dict(), topology, versions], sort_keys=True).encode())
    return content.hexdigest()[:20]
