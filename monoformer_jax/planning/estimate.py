"""What a training step or the sampler needs of a TPU slice, found by compiling it: memory, products,
traffic, and a lower bound of its time."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoformer_jax import batch as contract
from monoformer_jax.config import Config
from monoformer_jax.diffusion.solvers import make_time_grid
from monoformer_jax.errors import require
from monoformer_jax.models import monoformer
from monoformer_jax.nn.decoder import KVCache
from monoformer_jax.parallel import (
    BATCH,
    TENSOR_AXIS,
    batch_shards,
    check_batch_size,
    make_mesh,
    parameter_shardings,
)
from monoformer_jax.planning import flops
from monoformer_jax.planning.collectives import Collective, collectives
from monoformer_jax.planning.hardware import CHIPS, Chip, all_chips, chip_of
from monoformer_jax.sampling import image
from monoformer_jax.sampling.state import init_decode_state
from monoformer_jax.training.state import abstract_train_state, make_train_step

GIB = 2**30
IMAGES = 8  # painted at once on a device (that shares them along tensor), when sampling
PROMPT = 32  # tokens of their prompts
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device; sizes in bytes, products of the whole slice.

    Args:
      temporaries, peak: as the compiler has them; of a program that does not fit, what it asked for.
      sent: none are known of a program that does not fit.
    """

    config: Config
    mesh: Mesh
    chip: Chip
    fits: bool
    arguments: int
    temporaries: int
    peak: int
    aliased: int
    parameters: int
    flops: int
    repeated_flops: int
    sent: tuple[Collective, ...]
    compile_seconds: float

    def floors(self) -> dict[str, float]:
        """Seconds that the step takes at least, by what it waits for.

        compute: the products of all layers, with what remat repeats, at the chip's peak; attention's
        scores and the heads are left out, since they depend on the rows.
        hbm: the arguments read once, and what is updated in place written once.
        ici: what the collectives send, over all links of the chip at once.
        """
        chips = self.mesh.size
        return {
            "compute": self.repeated_flops / chips / (self.chip.tflops * 1e12),
            "hbm": (self.arguments + self.aliased) / (self.chip.hbm_gbs * 1e9),
            "ici": sum(one.sent for one in self.sent) / (self.chip.ici_gbs * 1e9),
        }

    @property
    def floor(self) -> float:
        return max(self.floors().values())

    def seconds_at(self, utilization: float) -> float:
        """Of a step, at a share of the slice's peak spent on the model's own products."""
        return self.flops / (self.mesh.size * self.chip.tflops * 1e12 * utilization)

    def to_json(self) -> dict:
        return {
            "fits": self.fits,
            "hbm_gib": self.chip.hbm_gib,
            "peak_gib": self.peak / GIB,
            "arguments_gib": self.arguments / GIB,
            "temporaries_gib": self.temporaries / GIB,
            "parameters": self.parameters,
            "flops_per_step": self.flops,
            "compile_seconds": self.compile_seconds,
            "step_seconds_floor": self.floor,
        }


def slice_mesh(config: Config, topology: str) -> Mesh:
    """The config's mesh of the devices of a topology.

    Raises:
      InputError: no such topology, or the mesh or the batch does not suit it.
    """
    mesh = make_mesh(config.mesh, all_chips(topology, config.mesh.slices))
    check_batch_size(config.batch_size, config.optimizer.grad_accum_steps, mesh)
    try:
        abstract_train_state(config, mesh)
    except ValueError as error:
        require(False, str(error))
    return mesh


def bytes_on_device(tree) -> int:
    """Of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def argument_bytes(config: Config, topology: str, mode: str = "train") -> int:
    """Bytes of the program's arguments on a device; nothing is compiled.

    Raises:
      InputError: see `slice_mesh`.
    """
    return bytes_on_device(_PROGRAMS[mode](config, slice_mesh(config, topology))[1])


def estimate(config: Config, topology: str, mode: str = "train") -> Estimate:
    """Compiles the step (or the sampler) ahead of time for a slice that is not there.

    Raises:
      InputError: see `slice_mesh`.
    """
    mesh, chip = slice_mesh(config, topology), CHIPS[chip_of(topology)]
    program, arguments = _PROGRAMS[mode](config, mesh)
    params = jax.eval_shape(lambda: monoformer.init(config.model, jax.random.key(0)))
    begin = time.perf_counter()
    fits, aliased, sent = True, 0, ()
    given = bytes_on_device(arguments)
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fits, temporaries = False, _wanted(str(error))
        peak = given + temporaries
    else:
        memory = compiled.memory_analysis()
        given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        aliased = memory.alias_size_in_bytes
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
        fits = peak <= chip.hbm_gib * 2**30
        sent = tuple(collectives(compiled.as_text(), mesh))
    seconds = time.perf_counter() - begin
    model, repeated = _FLOPS[mode](config, mesh)
    return Estimate(
        config, mesh, chip, fits, given, temporaries, peak, aliased,
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)), model, repeated, sent,
        seconds,
    )  # fmt: skip


def _wanted(message: str) -> int:
    """Bytes of temporaries in the compiler's complaint that they do not fit."""
    number, unit = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message).groups()
    return int(float(number) * UNITS[unit])


def _train_program(config: Config, mesh: Mesh):
    fields = contract.spec(config)
    batch = _placed(fields, NamedSharding(mesh, BATCH))
    return make_train_step(config, mesh), (abstract_train_state(config, mesh), batch)


def _train_flops(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Of a step as it is usually counted: every token, its next token predicted, in rows of one
    causal document. And what the blocks alone cost with what remat repeats."""
    c, length = config.model, config.data.max_seq_len
    tokens = config.batch_size * length
    token = flops.layers(c) + flops.text_head(c) + flops.patch(c)
    pairs = config.batch_size * length * (length + 1) // 2
    model = flops.TRAINING * (tokens * token + pairs * flops.attention(c))
    return model, tokens * (flops.TRAINING * flops.layers(c) + flops.recomputed(c))


def _placed(tree, sharding: NamedSharding):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _sample_program(config: Config, mesh: Mesh):
    """All steps of many images at once, after prompts that have run."""
    c, images = config.model, _images(mesh)
    branches = image.guidance_branches(config.sampling, shown=False)
    spec = image.make_image_spec(config, config.sampling, (config.data.image_size,) * 2, branches)
    params = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        params, parameter_shardings(monoformer.logical_axes(c), params, mesh),
    )  # fmt: skip
    by_rows = NamedSharding(mesh, BATCH)
    cache_of_prompts = functools.partial(KVCache.create, c, images * branches, PROMPT)
    rows = jax.eval_shape(
        lambda: init_decode_state(c, images * branches).replace(cache=cache_of_prompts())
    )
    heads = NamedSharding(mesh, PartitionSpec(None, *BATCH, None, TENSOR_AXIS))
    cache = KVCache(
        *_placed((rows.cache.k, rows.cache.v), heads),
        _placed(rows.cache.index, NamedSharding(mesh, PartitionSpec())),
    )
    rows = _placed(rows.replace(cache=None), by_rows).replace(cache=cache)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    x = jax.ShapeDtypeStruct((images, spec.patches, c.patch_dim), "float32")

    def sample(params, rows, x, keys):
        grid = make_time_grid(config.sampling.solver, config.sampling.steps, config.sampling.shift)
        guidance = image.make_guidance(config.sampling)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return image.denoise(params, rows, x, keys, grid, guidance, 0, grid.steps, spec)

    return jax.jit(sample), (params, rows, *_placed((x, keys), by_rows))


def _sample_flops(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Of the images of one call, and of the blocks alone."""
    c, s, n = config.model, config.sampling, config.image_tokens
    steps = int(make_time_grid(s.solver, s.steps, s.shift).steps)
    passes = steps * (2 if s.solver == "heun" else 1) * image.guidance_branches(s, shown=False)
    blocks = _images(mesh) * passes * n * flops.layers(c)
    rest = n * (n + PROMPT) * flops.attention(c) + n * flops.patch(c)
    return blocks + _images(mesh) * passes * rest, blocks


def _images(mesh: Mesh) -> int:
    return IMAGES * batch_shards(mesh)


_PROGRAMS = {"train": _train_program, "sample": _sample_program}
_FLOPS = {"train": _train_flops, "sample": _sample_flops}
MODES = tuple(_PROGRAMS)
