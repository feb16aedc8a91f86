"""What a compiled program sends between chips, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^,}]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation, as often as a step runs it.

    Args:
      kind: one of `KINDS`.
      shape: dtype and dimensions of what comes out, of several arrays the largest.
      size: bytes on one chip, of a reduce-scatter before it is cut.
      axes: names of the mesh axes that it runs along.
      group: chips that take part together.
      times: runs a step.
      where: the `op_name` that XLA keeps from JAX.
    """

    kind: str
    shape: str
    size: int
    axes: tuple[str, ...]
    group: int
    times: int
    where: str

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in a step at least, with the best ring."""
        share = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            share = 1.0
        return self.times * self.size * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a program compiled for a mesh; loops count as often as they turn.

    A loop whose number of turns is only known when it runs counts once.
    """
    computations = _computations(text)
    times = _times(computations)
    found = []
    for name, lines in computations.items():
        body = "\n".join(lines)
        for line in lines:
            if not (match := _COLLECTIVE.search(line)) or not times.get(name):
                continue
            # TPU runs one of these beside other work as a chain of fusions which all repeat it.
            if "chain_id=" in line and "AsyncCollectiveStart" not in body:
                continue
            kind = match[2]
            if kind == "all-reduce" and "from-cross-replica-sharding" in line:
                kind = "reduce-scatter"  # an all-reduce of which each chip keeps its part
            shape, size = _result(match[1], "-start(" in match[0])
            group = _group(line, mesh.size)
            if kind == "reduce-scatter" and match[2] == kind:
                size *= len(group)
            where = re.search(r'op_name="([^"]*)"', line)
            if len(group) > 1:
                found.append(
                    Collective(kind, shape, size, _axes(group, mesh), len(group), times[name],
                               where[1] if where else "")
                )  # fmt: skip
    return found


def _computations(text: str) -> dict[str, list[str]]:
    found, lines = {}, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[("ENTRY" if line.startswith("ENTRY") else match[1])] = []
        elif lines is not None:
            lines.append(line)
    return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often a step runs each computation."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in computations.get(name, ()):
            for called in _CALLED.findall(line):
                turns = _turns(line, computations) if " while(" in line else 1
                for one in called.split(","):
                    visit(one.strip().lstrip("%"), count * turns)

    visit("ENTRY", 1)
    return times


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """Turns of a while loop that counts from 0 to a constant; 1 for any other."""
    condition = computations[re.search(r"condition=%?([\w.-]+)", line)[1]]
    root = next(one for one in condition if one.lstrip().startswith("ROOT"))
    bound = re.search(r"compare\([^,]+, %?([\w.-]+)\), direction=LT", root)
    for one in condition:
        if bound and re.match(rf"\s*%?{re.escape(bound[1])} = s32\[\]", one):
            constant = re.search(r" constant\((\d+)\)", one)
            return int(constant[1]) if constant else 1
    return 1


def _result(types: str, starts: bool) -> tuple[str, int]:
    """The largest array of a (tuple) type as written, and the bytes of all that comes out.

    What only starts an operation has its operands in the tuple too: there the largest counts.
    """
    sizes = [
        (f"{dtype}[{dims}]", BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d))
        for dtype, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", types)
        if dtype in BYTES
    ]
    shape, size = max(sizes, key=lambda pair: pair[1])
    return shape, size if starts else sum(size for _, size in sizes)


def _group(line: str, devices: int) -> list[int]:
    """The first group of a collective, as positions in the mesh."""
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
