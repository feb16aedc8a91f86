"""Predicted step time of a program compiled for TPU, from the schedule in its HLO text.

XLA's TPU compiler writes the cycles that it expects of each instruction into the scheduled HLO
(`estimated_cycles`). The prediction walks the schedule in order, once per loop iteration: compute takes
its cycles; a synchronous collective takes its bytes over the links that it can use, and nothing runs
beside it; an asynchronous one transfers while the instructions between its start and its done run, and
what is left of it at the done is exposed. Two transfers never share the links. The kernels of attention
have no estimate in the HLO, so their time is passed in.

It is a model, not a measurement: no stalls, no variation between chips, collectives at full link speed.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping

from jax.sharding import Mesh

from monoformer_jax.planning.collectives import (
    SCATTERING,
    Collective,
    computations_of,
    loop_turns,
    parse_collective,
)
from monoformer_jax.planning.hardware import Chip, link_gbs

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z0-9-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Categories by `jax.named_scope`, innermost first; other work is told apart by its operation.
SCOPES = ("rope", "norm", "text_loss", "optimizer")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective in its place of the schedule. Times in seconds, of one execution.

    Args:
      gbs: GB/s that a chip can send over the links of the collective's axes.
      seconds: bytes sent over `gbs`.
      exposed: time in which nothing else runs.
      hidden_by: the operation that runs beside it for longest; "" for a synchronous collective.
    """

    collective: Collective
    gbs: float
    seconds: float
    exposed: float
    hidden_by: str
    asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a computation's schedule, in seconds from its begin: for the picture."""

    label: str
    begin: float
    end: float
    collective: bool


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted time of one execution of the program, in seconds.

    Args:
      compute: time by category, collectives left out.
      transfers: every collective; `collective.times` is the number of its executions.
      spans: by computation, the schedule of one execution.
    """

    compute: Mapping[str, float]
    transfers: tuple[Transfer, ...]
    spans: Mapping[str, tuple[Span, ...]]

    @property
    def exposed(self) -> float:
        """Time in which collectives run and nothing else does, synchronous ones included."""
        return sum(one.exposed * one.collective.times for one in self.transfers)

    @property
    def synchronous(self) -> float:
        """The part of `exposed` in synchronous collectives."""
        return sum(
            one.exposed * one.collective.times for one in self.transfers if not one.asynchronous
        )

    @property
    def seconds(self) -> float:
        return sum(self.compute.values()) + self.exposed


def predict(
    text: str,
    mesh: Mesh,
    chip: Chip,
    kernels: Mapping[str, float] | None = None,
    dynamic_trips: int = 1,
) -> Prediction:
    """Predicts the time of a program from its scheduled HLO.

    Args:
      text: `compiled.as_text()`.
      mesh: the mesh that it was compiled for.
      kernels: seconds of one call of each kernel, by the name of its instruction.
      dynamic_trips: iterations of a loop whose trip count is known only when it runs.
    """
    walk = _Walk(computations_of(text), mesh, chip, kernels or {}, dynamic_trips)
    compute, transfers = walk.run("ENTRY", 1)
    return Prediction(compute, tuple(transfers), walk.spans)


@dataclasses.dataclass
class _Open:
    """An asynchronous collective between its start and its done."""

    collective: Collective
    begin: float
    ready: float  # when its last byte has arrived
    waited: float  # time in which a synchronous collective waited for its links
    beside: collections.Counter  # seconds of what ran since its start, by category


class _Walk:
    """Walks the computations of a program in the order of their schedule."""

    def __init__(self, computations, mesh, chip, kernels, dynamic_trips):
        self.computations, self.mesh, self.chip = computations, mesh, chip
        self.kernels, self.dynamic_trips = kernels, dynamic_trips
        self.spans: dict[str, tuple[Span, ...]] = {}
        self._nested: dict[str, list[str]] = {}

    def run(self, name: str, times: int) -> tuple[collections.Counter, list[Transfer]]:
        """Seconds by category of `times` executions of a computation, and its collectives."""
        compute: collections.Counter = collections.Counter()
        transfers: list[Transfer] = []
        spans: list[Span] = []
        clock, links_free = 0.0, 0.0
        waiting: dict[str, _Open] = {}
        # Set up on a SparseCore without operands, which an update brings, by the name of the start.
        offloaded: dict[str, Collective] = {}

        def begin_transfer(collective):
            nonlocal links_free
            begin = max(clock, links_free)
            links_free = begin + self._seconds(collective)
            return _Open(collective, begin, links_free, 0.0, collections.Counter())

        def finish(one, asynchronous):
            nonlocal clock
            exposed = max(one.ready - clock, 0.0)
            clock += exposed
            if not asynchronous and waiting:  # it is the open ones whose links it waited for
                waited = one.begin - (clock - exposed)
                list(waiting.values())[-1].waited += waited
                exposed -= waited
            spans.append(Span(one.collective.kind, one.begin, one.ready, True))
            beside = max(one.beside, key=one.beside.get, default="")
            exposed += one.waited
            transfers.append(self._transfer(one.collective, exposed, beside, asynchronous))

        for line in self.computations.get(name, ()):
            if not (match := _INSTRUCTION.match(line)):
                continue
            label, operation, operands = match.groups()
            before = clock
            if bodies := self._bodies(line, operation):
                for body, turns in bodies:
                    inner, moved = self.run(body, times * turns)
                    compute.update(inner)
                    transfers += moved
                    waits = sum(one.exposed * one.collective.times for one in moved)
                    clock += (sum(inner.values()) + waits) / times
                spans.append(Span("loop", before, clock, False))
                continue
            inside = self._inside(line)
            scatters = f"calls=%{SCATTERING}" in line
            found = (parse_collective(one, self.mesh, times, scatters) for one in inside)
            collective = next((one for one in found if one), None)
            part = _part_of(operation, inside)
            operand = _name(operands)
            if collective is not None and operation == "async-start" and not operand:
                offloaded[label] = collective
            elif collective is not None and operation == "async-start":
                waiting[label] = begin_transfer(collective)
            elif operation == "async-update" and operand in offloaded:
                waiting[label] = begin_transfer(offloaded.pop(operand))
            elif operation == "async-done" and operand in waiting:
                finish(waiting.pop(operand), True)
            elif collective is not None and part == "start":
                waiting[_key(inside, label)] = begin_transfer(collective)
            elif collective is not None and not (operation == "fusion" and _is_link(inside)):
                finish(begin_transfer(collective), False)
            elif part == "done" and (key := _key(inside, operands)) in waiting:
                finish(waiting.pop(key), True)
            elif seconds := self._compute_seconds(line, label):
                category = categorize(line, label, operation, inside)
                compute[category] += seconds * times
                clock += seconds
                spans.append(Span(category, before, clock, False))
                for one in waiting.values():
                    one.beside[category] += seconds
        for one in waiting.values():
            finish(one, True)
        self.spans[name] = tuple(spans)
        return compute, transfers

    def _bodies(self, line: str, operation: str) -> list[tuple[str, int]]:
        """Computations that an instruction runs one after the other, and how often."""
        if operation == "while":
            body = re.search(r"body=%?([\w.-]+)", line)[1]
            return [(body, loop_turns(line, self.computations) or self.dynamic_trips)]
        if operation == "conditional":  # the last branch, which is that of a true predicate
            branches = re.search(r"(?:branch_computations=\{|true_computation=)([^,}]+)", line)
            return [(branches[1].strip().lstrip("%"), 1)]
        if operation == "call":
            return [(re.search(r"to_apply=%?([\w.-]+)", line)[1], 1)]
        return []

    def _inside(self, line: str) -> list[str]:
        """The instruction and those of the computations that it fuses."""
        called = re.search(r"call(?:s=|ed_computations=\{)%?([\w.-]+)", line)
        return [line] + (self._lines_of(called[1]) if called else [])

    def _lines_of(self, name: str) -> list[str]:
        if name not in self._nested:
            lines = self.computations.get(name, ())
            self._nested[name] = [x for line in lines for x in self._inside(line)]
        return self._nested[name]

    def _compute_seconds(self, line: str, label: str) -> float:
        for kernel, seconds in self.kernels.items():
            if label.startswith(kernel):
                return seconds
        cycles = _CYCLES.search(line)
        return int(cycles[1]) / (self.chip.clock_ghz * 1e9) if cycles else 0.0

    def _seconds(self, collective: Collective) -> float:
        gbs = link_gbs(self.chip, self.mesh, collective.group)
        return collective.sent / collective.times / (gbs * 1e9)

    def _transfer(self, collective, exposed, beside, asynchronous) -> Transfer:
        gbs = link_gbs(self.chip, self.mesh, collective.group)
        return Transfer(collective, gbs, self._seconds(collective), exposed, beside, asynchronous)


def _part_of(operation: str, inside: list[str]) -> str:
    """Whether an instruction starts an asynchronous collective or waits for it."""
    for part in ("start", "done"):
        if operation.endswith(f"-{part}") or any(
            f'"AsyncCollective{part.capitalize()}"' in line for line in inside
        ):
            return part
    return ""


def _is_link(inside: list[str]) -> bool:
    """Whether a fusion is one of the chain in which an asynchronous collective goes on."""
    return any("chain_id=" in line for line in inside)


def _key(inside: list[str], name: str) -> str:
    """What the start and the done of a collective have in common: the channel, or the start's name."""
    channel = next((m[1] for x in inside if (m := re.search(r"channel_id=(\d+)", x))), None)
    return channel or _name(name)


def _name(operands: str) -> str:
    """The name of the first operand; "" if there is none."""
    match = re.match(r"[^\w)]*([\w.-]+)", operands)
    return match[1] if match else ""


def categorize(line: str, label: str, operation: str, inside: list[str]) -> str:
    """The category of an instruction, see `Prediction.compute`.

    Products by pass, "heads" outside the loop over blocks; the scopes of `SCOPES`; "attention" kernels;
    "fills", which have no origin in the model: zeros around a gather that is run as an all-reduce;
    "relayouts"; "scan", slices and updates of what is stacked over the blocks; "other".
    """
    where = _OP_NAME.search(line)
    where = where[1] if where else ""
    path = where.split("/")
    if label.startswith("interval_attention"):
        return "attention"
    if any(f" {kind}(" in one for one in inside for kind in ("convolution", "dot")):
        if "while" not in path or "text_loss" in path:
            return "heads"
        if "rematted_computation" in where:
            return "recomputation"
        return "backward" if "transpose(" in where else "forward"
    for scope in SCOPES:
        if scope in path or f"jvp({scope})" in path:
            return scope
    if operation == "broadcast" and not where:
        return "fills"
    if operation == "copy" or path[-1] in ("reshape", "squeeze", "transpose"):
        return "relayouts"
    if path[-1].startswith(("dynamic_slice", "dynamic_update_slice")):
        return "scan"
    return "other"
