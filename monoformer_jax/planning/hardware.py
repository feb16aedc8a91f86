"""TPU specifications, and device topologies for ahead-of-time compilation without a TPU."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError, require
from monoformer_jax.parallel import make_mesh
from monoformer_jax.planning import NO_TPU


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of one JAX device: a chip, or half a chip on tpu7x.

    Args:
      tflops: peak bfloat16 TFLOP/s.
      hbm_gib: HBM that libtpu 0.0.51 makes available to a program, GiB.
      hbm_gbs: HBM bandwidth, GB/s (10^9 bytes).
      ici_gbs: outgoing bandwidth of all inter-chip (ICI) links together, GB/s.
      links: number of those links: two along each of two or three directions.
      cores: cores of a device, each of which runs a part of a kernel.
      clock_ghz: clock of the matrix units: peak FLOP/s over what they start in a cycle.
      wrap: a direction whose length is a multiple of this is a ring; others are open.
    """

    tflops: float
    hbm_gib: float
    hbm_gbs: float
    ici_gbs: float
    links: int
    cores: int
    clock_ghz: float
    wrap: int


# From cloud.google.com/tpu/docs: the pages v4, v5e, v5p, v6e and tpu7x.
# The clocks: 4 matrix units of 128 x 128 in each of the 2 cores of a v4 and v5p and in a v5e; of
# 256 x 256 in a v6e and half a tpu7x. Rings: libtpu's "All wrap-around dimensions must be of length 16"
# for v5e and v6e; cubes of 4 x 4 x 4 for the others.
CHIPS = {
    "v4": Chip(275, 30.75, 1228, 300, 6, 2, 1.05, 4),
    "v5e": Chip(197, 15.75, 819, 200, 4, 1, 1.5, 16),
    "v5p": Chip(459, 95.73, 2765, 600, 6, 2, 1.75, 4),
    "v6e": Chip(918, 31.24, 1640, 448, 4, 1, 1.75, 16),
    "tpu7x": Chip(2307 / 2, 94.74, 7380 / 2, 600 / 2, 6, 1, 2.2, 4),
}
# Topology of a v5e or v6e slice by its number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def chip_of(topology: str) -> str:
    """Returns the key of `CHIPS` in a topology such as "v5e:2x2".

    Raises:
      InputError: the topology does not start with a known chip.
    """
    name = re.split("[:-]", topology)[0]
    if name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, 1, 0.3)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"topology {topology!r}: supported chips are {', '.join(CHIPS)}{hint}")
    return name


def all_chips(topology: str, slices: int = 1) -> list[jax.Device]:
    """Returns compile-only devices of a topology such as "v5e:2x2" (or "v5e-4").

    libtpu must be installed; the environment is set so that it needs no TPU and so that several
    processes can compile at once.

    Raises:
      InputError: libtpu is not installed or rejects the topology.
    """
    chip, shape = chip_of(topology), topology.partition(":")[2]
    flat = chip in ("v5e", "v6e")
    if flat and (number := re.fullmatch(rf"{chip}-(\d+)", topology)):
        shape = FLAT.get(int(number[1]), "")
    require(
        bool(re.fullmatch(r"\d+x\d+" if flat else r"\d+x\d+x\d+", shape)),
        f"topology {topology!r}: write it as {chip}:{'8x8' if flat else '2x2x2'}",
    )
    require(
        importlib.util.find_spec("libtpu") is not None,
        "compiling for TPU needs libtpu: pip install 'monoformer_jax[plan]'",
    )
    os.environ |= NO_TPU | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores form one device, as on real hardware
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{shape}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"topology {topology!r}: libtpu reports {str(error).splitlines()[0]}"
        ) from None
    return list(found.devices)


def link_gbs(chip: Chip, mesh: Mesh, group: Sequence[int]) -> float:
    """GB/s that a chip of a group of devices can send to the others of its group.

    In each direction of the network along which the group extends, a chip uses both of its links if
    the group is a whole ring, else one: the chips at an end have no other. Between slices this is an
    upper bound, since the data centre network is slower.

    Args:
      group: indices of `mesh.devices.flat`.
    """
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    here = everywhere[list(group)]
    lengths = [len(set(places)) for places in everywhere.T]
    flat, cubes = chip.links == 4, all(length % chip.wrap == 0 for length in lengths)
    links = 0
    for direction in range(everywhere.shape[1]):
        length, extent = lengths[direction], len(set(here[:, direction]))
        ring = extent == length and length % chip.wrap == 0 and (flat or cubes)
        links += (2 if ring else 1) if extent > 1 else 0
    return max(links, 1) * chip.ici_gbs / chip.links


def one_chip(topology: str) -> Mesh:
    """A mesh of the first device of a topology."""
    return make_mesh(MeshConfig(), all_chips(topology)[:1])


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array that is replicated on every device of the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
