"""TPU chips that are not there, to compile for."""

from __future__ import annotations

import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.parallel import make_mesh


def all_chips(topology: str) -> list[jax.Device]:
    """The devices of a topology such as "v5e:2x2", to compile for.

    libtpu must be installed; it looks for no TPU and lets several processes compile at once.
    """
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def one_chip(topology: str) -> Mesh:
    """A mesh of the first device of a topology."""
    return make_mesh(MeshConfig(), all_chips(topology)[:1])


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An array on every device of the mesh, whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
