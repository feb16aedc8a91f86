"""Timings of other implementations for `--compare=DIR`: one JSON file per implementation and workload.

{"name": "…", "seconds": 18.2, "images": 8, "steps": 20, "prompt_tokens": 64}     sampling
{"name": "…", "seconds": 1.21, "batch_size": 8, "max_seq_len": 321}                a training step
"""

from __future__ import annotations

import json
from pathlib import Path

from monoformer_jax.errors import InputError, require

# The keys that identify a workload, by benchmark.
WORK = {"sampling": ("images", "steps", "prompt_tokens"), "training": ("batch_size", "max_seq_len")}


def read_others(folder: Path) -> list[dict]:
    """Reads all JSON files of a folder; files of both benchmarks may be mixed.

    Raises:
      InputError: the folder has no JSON file, or a file has the wrong format.
    """
    files = sorted(folder.glob("*.json"))
    require(bool(files), f"--compare={folder}: there is no JSON file")
    others = []
    for file in files:
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            work = WORK["sampling" if "images" in other else "training"]
            others.append(
                {"name": str(other["name"]), "seconds": float(other["seconds"])}
                | {name: int(other[name]) for name in work}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--compare: {file} does not have the format shown by --help ({error!r})"
            ) from error
    return others


def print_others(bench: str, found: dict, others: list[dict]) -> None:
    """Prints a line for `found` and one for each of `others` with the same workload.

    Args:
      bench: a key of `WORK`.
      found: "seconds" and the workload keys of that benchmark.
      others: from `read_others`.
    """
    same = [other for other in others if all(other.get(x) == found[x] for x in WORK[bench])]
    print(f"{'same workload':24}{'seconds':>9}{'times as long':>15}")
    for row in [{"name": "monoformer_jax", "seconds": found["seconds"]}, *same]:
        ratio = row["seconds"] / found["seconds"]
        print(f"{row['name'][:23]:24}{row['seconds']:9.2f}{ratio:15.2f}")
    if left := len(others) - len(same):
        print(f"skipped {left} file(s) with another workload")
