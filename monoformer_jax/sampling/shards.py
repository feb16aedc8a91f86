"""Bulk image generation in shards: resumable, and shared by several processes.

    FOLDER/sampling.json      prompts, settings and checkpoint; a run with other values is refused
    FOLDER/00000128.npz       arr_0 uint8 [n, height, width, 3]: images 128, 129, …
    FOLDER/samples.npz        all images in order, in the format of ADM's evaluator, written last

Shards are written atomically. The noise of image i depends on (seed, i), so it does not depend on the
shard size or on the process. Processes of one jax.distributed run wait for each other at the end, and
process 0 merges the shards; of independent processes, the one that finishes last merges them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from monoformer_jax.errors import InputError, require
from monoformer_jax.files import atomic_write, check_writable, read_json
from monoformer_jax.runtime.processes import allgather_json, run_on_first

_FACTS, _SAMPLES = "sampling.json", "samples.npz"


def generate_shards(
    folder: epath.Path,
    total: int,
    shard: int,
    facts: Mapping[str, Any],
    generate: Callable[[int, int], np.ndarray],
    *,
    process: int = 0,
    processes: int = 1,
    log: Callable[[str], None] = print,
) -> epath.Path | None:
    """Generates the missing shards of this process.

    Args:
      folder: folder of the shards, shared by all processes.
      total: number of images over all processes.
      shard: images per shard.
      facts: settings that determine the images; they must equal those of existing shards.
      generate: (first, count) -> uint8 [count, height, width, 3].
      process, processes: this process generates the shards whose number is `process` modulo
        `processes`.
      log: prints a progress message.

    Returns:
      Path of samples.npz, or None while shards of other processes are missing.

    Raises:
      InputError: the folder holds shards of other images, or the processes do not share it.
    """
    for name, value in (("total", total), ("batch", shard)):
        require(value > 0, f"--{name}={value} must be above 0")
    facts = json.loads(json.dumps({**facts, "total": total, "shard": shard}))
    run_on_first(lambda: _claim(folder, facts))
    refusal = None
    try:
        _check(folder, facts)
    except InputError as error:
        refusal = str(error)
    refusals = [sentence for sentence in allgather_json(refusal) if sentence]
    require(not refusals, "; ".join(refusals))  # every process raises, before hours of work
    starts = range(0, total, shard)
    missing = _missing(folder, starts)
    mine = [first for first in starts[process::processes] if first in missing]
    if len(missing) < len(starts):
        existing = len(starts) - len(missing)
        log(f"{folder}: {existing} of {len(starts)} shards exist already")
    for number, first in enumerate(mine, 1):
        images = generate(first, min(shard, total - first))
        with atomic_write(_file(folder, first)) as path, path.open("wb") as file:
            np.savez(file, images)
        log(f"shard {number}/{len(mine)}: images {first} to {first + len(images) - 1}")
    allgather_json(None)  # barrier: all processes have finished their shards
    return folder / _SAMPLES if run_on_first(lambda: _finish(folder, starts, total)) else None


def _finish(folder: epath.Path, starts: range, total: int) -> bool:
    """Merges the shards if all exist."""
    if _missing(folder, starts):
        return False
    if not (folder / _SAMPLES).exists():
        shards = [_file(folder, first) for first in starts]
        with atomic_write(folder / _SAMPLES) as path, path.open("wb") as file:
            _join(file, shards, total)
    return True


def _missing(folder: epath.Path, starts: range) -> set[int]:
    # Listing the folder avoids the negative lookup cache of network file systems.
    existing = {path.name for path in folder.iterdir()}
    return {first for first in starts if _file(folder, first).name not in existing}


def _file(folder: epath.Path, first: int) -> epath.Path:
    return folder / f"{first:08d}.npz"


def _claim(folder: epath.Path, facts: Mapping[str, Any]) -> None:
    """Writes the settings of the images to a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FACTS
    if not path.exists():
        strays = sorted(folder.glob("*.npz"))
        require(not strays, f"{folder} holds {strays[0].name if strays else ''} but no {_FACTS} "
                "that describes it: give another --out")  # fmt: skip
        check_writable(folder, "--out")
        with atomic_write(path) as file:
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _check(folder: epath.Path, facts: Mapping[str, Any]) -> None:
    path = folder / _FACTS
    require(
        path.exists(),
        f"{folder} of process 0 does not exist here: give an --out that all processes share",
    )
    try:
        stored = dict(read_json(path))
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: remove the folder, or give another --out") from error
    changed = [
        key for key in sorted(facts.keys() | stored.keys()) if facts.get(key) != stored.get(key)
    ]
    require(
        not changed,
        f"{folder} holds images generated with another {', '.join(changed)} (see {path.name}); "
        "nothing was changed, give another --out",
    )


def _join(file, shards: list[epath.Path], total: int) -> None:
    """Writes all shards as one array, loading one shard at a time."""
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        for number, shard in enumerate(shards):
            with shard.open("rb") as stored, np.load(stored) as arrays:
                images = arrays["arr_0"]
            if number == 0:
                shape = (total, *images.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, header)
            out.write(images.tobytes())
