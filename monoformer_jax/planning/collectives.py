"""Collective operations of a compiled program and their traffic, parsed from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SCATTERING = "all-reduce-scatter"  # begins the name of a fusion of a sum and the slice of each chip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^,}]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation and how often a step runs it.

    Args:
      kind: one of `KINDS`.
      shape: dtype and dimensions of the result; of the largest if there are several.
      size: bytes of the result per chip; for a reduce-scatter, bytes of its input.
      axes: names of the mesh axes that it communicates over.
      group: a replica group, as indices of `mesh.devices.flat`; the others have the same shape.
      times: executions per step.
      where: the `op_name` metadata from JAX.
    """

    kind: str
    shape: str
    size: int
    axes: tuple[str, ...]
    group: tuple[int, ...]
    times: int
    where: str

    @property
    def sent(self) -> float:
        """Lower bound of the bytes that a chip sends per step, with a ring algorithm."""
        share = (len(self.group) - 1) / len(self.group)
        if self.kind == "collective-permute":
            share = 1.0
        return self.times * self.size * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mesh, dynamic_trips: int = 1) -> list[Collective]:
    """Returns all collectives of a program compiled for a mesh, counted once per loop iteration.

    Args:
      dynamic_trips: iterations of a loop whose trip count is known only when it runs.
    """
    computations = computations_of(text)
    times = _times(computations, dynamic_trips)
    found = []
    for name, lines in computations.items():
        body = "\n".join(lines)
        for line in lines:
            # For an asynchronous collective, TPU emits a chain of fusions that each contain it.
            if "chain_id=" in line and "AsyncCollectiveStart" not in body:
                continue
            scatters = name.startswith(SCATTERING)
            if times.get(name) and (one := parse_collective(line, mesh, times[name], scatters)):
                found.append(one)
    return found


def parse_collective(
    line: str, mesh: Mesh, times: int = 1, scatters: bool = False
) -> Collective | None:
    """The collective of an HLO instruction; None for any other one, and within one device.

    Args:
      scatters: an all-reduce keeps only the shard of each chip.
    """
    if not (match := _COLLECTIVE.search(line)):
        return None
    kind, group = match[2], _group(line, mesh.size)
    if len(group) < 2:
        return None
    if kind == "all-reduce" and (scatters or "from-cross-replica-sharding" in line):
        kind = "reduce-scatter"
    shape, size = _result(match[1], "-start(" in match[0])
    if kind == "reduce-scatter" and match[2] == kind:
        size *= len(group)
    where = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind, shape, size, _axes(group, mesh), tuple(group), times, where[1] if where else ""
    )


def computations_of(text: str) -> dict[str, list[str]]:
    """The lines of every computation of a module by name; the first one to run is "ENTRY"."""
    found, lines = {}, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[("ENTRY" if line.startswith("ENTRY") else match[1])] = []
        elif lines is not None:
            lines.append(line)
    return found


def _times(computations: dict[str, list[str]], dynamic_trips: int) -> dict[str, int]:
    """Executions per step of each computation."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in computations.get(name, ()):
            for called in _CALLED.findall(line):
                is_loop = " while(" in line
                turns = loop_turns(line, computations) or dynamic_trips if is_loop else 1
                for one in called.split(","):
                    visit(one.strip().lstrip("%"), count * turns)

    visit("ENTRY", 1)
    return times


def loop_turns(line: str, computations: dict[str, list[str]]) -> int | None:
    """Trip count of a while loop that counts from 0 to a constant; None for any other loop."""
    condition = computations[re.search(r"condition=%?([\w.-]+)", line)[1]]
    root = next(one for one in condition if one.lstrip().startswith("ROOT"))
    bound = re.search(r"compare\([^,]+, %?([\w.-]+)\), direction=LT", root)
    for one in condition:
        if bound and re.match(rf"\s*%?{re.escape(bound[1])} = s32\[\]", one):
            constant = re.search(r" constant\((\d+)\)", one)
            return int(constant[1]) if constant else None
    return None


def _result(types: str, starts: bool) -> tuple[str, int]:
    """The largest array of a (tuple) type as written in HLO, and the bytes of all results.

    The type of a -start operation also contains its operands: only the largest array counts then.
    """
    sizes = [
        (f"{dtype}[{dims}]", BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d))
        for dtype, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", types)
        if dtype in BYTES
    ]
    shape, size = max(sizes, key=lambda pair: pair[1])
    return shape, size if starts else sum(size for _, size in sizes)


def _group(line: str, devices: int) -> list[int]:
    """The first replica group of a collective, as device indices in the mesh."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(i) for i in match[1].split(",")]
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line):
        pairs = re.findall(r"(\d+),(\d+)", match[1])
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, reshape, order = (
            [int(i) for i in (part or "").split(",") if i] for part in match.groups()
        )
        ids = np.arange(devices).reshape(reshape)
        return list(map(int, ids.transpose(order or None).reshape(shape)[0]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\S* \{([^}]*)\}", line):
        axes = re.findall(r"'(\w+)'=(\d+)", match[1])
        grid = np.arange(devices).reshape([int(size) for _, size in axes])
        kept = [slice(None) if f"'{name}'" in match[2] else 0 for name, _ in axes]
        return list(map(int, grid[tuple(kept)].reshape(-1)))
    return list(range(devices))


def _axes(group: list[int], mesh: Mesh) -> tuple[str, ...]:
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(
        name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row)) > 1
    )
