"""Compiler options of the programs that train and sample, by chip.

They are given to `jax.jit`, not in the environment, so that `plan` compiles the same program as `train`
and `sample`. No option changes a result by more than the order of a sum.
"""

from __future__ import annotations

import functools
import re
import sys

import jax
from jax.sharding import SingleDeviceSharding

from monoformer_jax.errors import InputError, require

# Milliseconds are the gain that `plan` predicts for configs/imagenet256.py on v5e:8x8, of 208, added in
# this order (docs/benchmarks.md); nothing was timed.
_V5E = {
    # Gathers of at most 16 MiB are gathers, not sums with zeros elsewhere: 21 ms.
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    # The gradients of a layer are summed while the next products run, the three together: 23 ms.
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # Sums of more bytes are not combined into one, which could only start after the last of them.
    "xla_jf_crs_combiner_threshold_in_bytes": "65536",
}
_SPARSE_CORE = "xla_tpu_enable_sparse_core_collective_offload_"
# The same for v6e:8x8, of 88 ms.
_V6E = {
    # The SparseCores gather, and sum gradients of which each chip keeps its shard, while products run:
    # 22 ms.
    f"{_SPARSE_CORE}all_gather": "true",
    f"{_SPARSE_CORE}2d_all_gather": "true",
    f"{_SPARSE_CORE}reduce_scatter": "true",
    f"{_SPARSE_CORE}nd_reduce_scatter": "true",
    # Small gathers are gathers: 10 ms.
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
# v5p:4x4x4 with all of them: 53 ms. Without them it was not compiled; a loop of MLPs gathered as sums.
_V5P = _V6E | {f"{_SPARSE_CORE}3d_all_gather": "true"}
# By `device_kind`. Any other chip is compiled with XLA's defaults: no gain was predicted for it.
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
}


def compiler_options(own: str, device: jax.Device) -> dict[str, str]:
    """Options of the compiler for a device: those of its chip, and over them `own`, which are
    `Config.compiler_options`.

    One of the table that the installed libtpu does not know is left out, with a warning.

    Raises:
      InputError: the compiler refuses an option of the config, or all of them together.
    """
    here = jax.local_devices()[0]  # a device of another host cannot be compiled for
    same = here.device_kind == device.device_kind
    return dict(_options(own, here if same else device))


def advice(error: RuntimeError) -> str | None:
    """What to change after an error of the compiler: one sentence, if one is known."""
    if "requires allocation in the alternate memory" not in str(error):
        return None
    return (
        "the compiler cannot hold in VMEM what it sends beside the products: give "
        "--config.compiler_options=xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false, or a "
        "smaller model.scan_unroll"
    )


def parse_options(text: str) -> dict[str, str]:
    """ "a=1,b=true" as a dict.

    Raises:
      InputError: a part is not NAME=VALUE.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        require(
            bool(name and equals and value),
            f"compiler_options: {part!r} is not NAME=VALUE; several are separated by commas",
        )
        found[name.strip()] = value.strip()
    return found


@functools.cache
def _options(own: str, device: jax.Device) -> tuple[tuple[str, str], ...]:
    given = parse_options(own)
    options = OPTIONS.get(device.device_kind, {}) | given
    while options:
        refused, reason = _refused(options, device)
        if refused is None:
            break
        if refused in given:
            raise InputError(f"compiler_options: {reason}")
        print(f"WARNING: compiling without {refused}: {reason}", file=sys.stderr, flush=True)
        del options[refused]
    return tuple(options.items())


def _refused(options: dict[str, str], device: jax.Device) -> tuple[str | None, str]:
    """The first option that the compiler of a device refuses, and its reason; None if it takes all."""
    empty = jax.jit(lambda x: x).lower(
        jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    )
    try:
        empty.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if name := next((name for name in options if re.search(rf"\b{name}\b", reason)), None):
            return name, f"{device.device_kind}: {reason}"
        raise InputError(f"compiler_options: {device.device_kind}: {reason}") from error
    return None, ""
