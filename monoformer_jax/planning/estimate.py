"""Ahead-of-time estimates for a train step or the sampler on a TPU slice: memory, FLOPs, collectives,
a lower bound of the step time and, for a train step, its predicted time."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from monoformer_jax import batch as contract
from monoformer_jax.config import Config, MeshConfig
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import open_tokenizer
from monoformer_jax.diffusion.solvers import EVALUATIONS, make_time_grid
from monoformer_jax.errors import InputError
from monoformer_jax.models import abstract_params, get_model
from monoformer_jax.parallel import (
    BATCH,
    batch_shards,
    bytes_on_device,
    make_mesh,
    use_mesh,
)
from monoformer_jax.planning.collectives import Collective, collectives
from monoformer_jax.planning.hardware import CHIPS, Chip, all_chips, chip_of, link_gbs
from monoformer_jax.planning.kernels import kernel_seconds
from monoformer_jax.planning.rows import TRAINING, Rows, assumed_rows, rows_of
from monoformer_jax.planning.schedule import Prediction, predict
from monoformer_jax.runtime.compiler import advice, compiler_options
from monoformer_jax.sampling import image
from monoformer_jax.sampling.sampler import (
    IMAGES,
    PROMPT,
    abstract_state,
    abstract_weights,
    sampling_mesh,
)
from monoformer_jax.sampling.text import row_keys
from monoformer_jax.training.state import abstract_train_state, check_layout, make_train_step

GIB = 2**30
SAMPLE = 64  # rows that are packed to measure their content
FED = 0.5  # model FLOPs utilization at which the hosts must feed the chips
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Feed:
    """What the hosts of a slice must feed to its chips.

    Attributes:
      hosts: number of hosts of the slice.
      rows: rows of a batch that each host makes.
      images_per_row: mean of packed rows; without the data, the most that fit.
      real_token_share: share of tokens that are not padding; None without the data.
      content: packed rows of the data, or those that are assumed.
    """

    hosts: int
    rows: float
    images_per_row: float
    real_token_share: float | None
    content: Rows

    def images_per_s(self, step_seconds: float) -> float:
        """Images that a host must make per second, for steps of this time."""
        return self.rows * self.images_per_row / step_seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a program. Sizes are in bytes per device; FLOPs are those of the complete slice.

    Args:
      temporaries, peak: as reported by the compiler, also for a program that does not fit.
      sent: collectives; empty for a program that does not fit.
      feed: what the hosts must feed; None for sampling.
      prediction: of the time of a train step that fits.
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
    feed: Feed | None = None
    prediction: Prediction | None = None

    def floors(self) -> dict[str, float]:
        """Lower bounds of the step time in seconds, by resource.

        compute: matrix products of all blocks, including remat, at the chip's peak FLOP/s; attention
        scores and the heads are left out, since they depend on the rows.
        hbm: reading the arguments once, and writing the donated arguments once.
        ici: bytes sent by the collectives, over the links that each can use.
        """
        chips = self.mesh.size
        return {
            "compute": self.repeated_flops / chips / (self.chip.tflops * 1e12),
            "hbm": (self.arguments + self.aliased) / (self.chip.hbm_gbs * 1e9),
            "ici": sum(
                one.sent / (link_gbs(self.chip, self.mesh, one.group) * 1e9) for one in self.sent
            ),
        }

    @property
    def floor(self) -> float:
        return max(self.floors().values())

    def seconds_at(self, utilization: float) -> float:
        """Seconds per step at a model FLOPs utilization (MFU)."""
        return self.flops / (self.mesh.size * self.chip.tflops * 1e12 * utilization)

    @property
    def useful_mfu(self) -> float:
        """Predicted model FLOPs utilization: real tokens, visible pairs and text targets; no remat."""
        config = self.config
        useful = self.feed.content.flops(config.model, config.batch_size)
        return useful / (self.mesh.size * self.chip.tflops * 1e12 * self.prediction.seconds)

    @property
    def useful_images_per_s(self) -> float:
        images = self.config.batch_size * self.feed.content.images
        return images / self.prediction.seconds

    def to_json(self) -> dict:
        feed = {}
        if self.feed is not None:
            feed = {
                "hosts": self.feed.hosts,
                "streams": self.config.streams,
                "host_images_per_s": self.feed.images_per_s(self.seconds_at(FED)),
                "real_token_share": self.feed.real_token_share,
            }
        if self.prediction is not None:
            feed |= {
                "predicted_step_ms": 1e3 * self.prediction.seconds,
                "exposed_collective_ms": 1e3 * self.prediction.exposed,
                "useful_mfu": self.useful_mfu,
                "useful_images_per_s": self.useful_images_per_s,
            }
        return feed | {
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


def slice_mesh(config: Config, topology: str, mode: str = "train") -> Mesh:
    """Returns the config's mesh on the devices of a topology.

    Raises:
      InputError: no such topology, or the mesh or the batch size does not fit it.
    """
    devices = all_chips(topology, config.mesh.slices)
    if mode == "train":
        return check_layout(config, devices)
    mesh = make_mesh(config.mesh, devices)
    abstract_weights(config.model, "float32", mesh)
    return mesh


def count_hosts(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def measure_feed(config: Config, mesh: Mesh) -> Feed:
    """Packs some rows of the first stream, if the records and the tokenizer are within reach."""
    hosts = count_hosts(mesh)
    rows = config.batch_size / hosts
    try:
        tokenizer = open_tokenizer(config.data, Path(), config.layout.vocab_size)
        group = config.batch_size // config.streams
        iterator = Batches(config, tokenizer, range(group)).iterator
        made = [next(iterator) for _ in range(max(1, SAMPLE // group))]
    except (InputError, ImportError):
        return Feed(hosts, rows, config.max_images, None, _assumed(config))
    real = sum(int((batch["token_types"] != contract.PAD).sum()) for batch in made)
    images = sum(int(batch["image_ids"].max(-1).sum()) for batch in made)
    count = group * len(made)
    share = real / (count * config.data.max_seq_len)
    return Feed(hosts, rows, images / count, share, rows_of(made))


def _assumed(config: Config) -> Rows:
    return assumed_rows(config.data.max_seq_len, config.image_tokens, config.layout.time_tokens)


def default_mesh(config: Config, topology: str, dtype: str) -> MeshConfig:
    """Returns the default mesh of `sample`, see `sampling_mesh`."""
    chip = CHIPS[chip_of(topology)]
    mesh = sampling_mesh(config, all_chips(topology), dtype, chip.hbm_gib * GIB)
    return MeshConfig(**mesh.shape)


def argument_bytes(
    config: Config, topology: str, mode: str = "train", dtype: str = "float32"
) -> int:
    """Bytes per device of the program's arguments, without compiling it.

    Raises:
      InputError: see `slice_mesh`.
    """
    mesh = slice_mesh(config, topology, mode)
    return _bytes_of(_PROGRAMS[mode](config, mesh, dtype)[1])


def _bytes_of(arguments) -> int:
    """Bytes of the arguments with a sharding; the others are small settings on the host."""
    leaves = jax.tree.leaves(arguments)
    return bytes_on_device([x for x in leaves if getattr(x, "sharding", None) is not None])


def estimate(
    config: Config, topology: str, mode: str = "train", dtype: str = "float32"
) -> Estimate:
    """Compiles the train step or the sampler ahead of time for a slice, without its devices.

    Args:
      mode: "train" or "sample".
      dtype: dtype of the weights in sampling; training uses float32.

    Raises:
      InputError: see `slice_mesh`; or the compiler cannot make the program, see `compiler.advice`.
    """
    mesh, chip = slice_mesh(config, topology, mode), CHIPS[chip_of(topology)]
    program, arguments = _PROGRAMS[mode](config, mesh, dtype)
    params = abstract_params(config.model)
    feed = measure_feed(config, mesh) if mode == "train" else None
    begin = time.perf_counter()
    fits, aliased, sent, prediction = True, 0, (), None
    given = _bytes_of(arguments)
    try:
        with use_mesh(mesh):
            lowered = program.lower(*arguments)
        with ThreadPoolExecutor(1) as pool:  # the kernels are compiled beside the program
            kernels = pool.submit(_kernels, config, mesh, topology, feed, lowered)
            compiled, text = compile_scheduled(lowered)
    except jax.errors.JaxRuntimeError as error:
        if text := advice(error):
            raise InputError(text) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fits, temporaries = False, _parse_oom_bytes(str(error))
        peak = given + temporaries
    else:
        memory = compiled.memory_analysis()
        given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        aliased = memory.alias_size_in_bytes
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
        fits = peak <= chip.hbm_gib * 2**30
        trips = _solver_steps(config) if mode == "sample" else 1
        sent = tuple(collectives(text, mesh, trips))
        if mode == "train":
            prediction = predict(text, mesh, chip, kernels.result())
    seconds = time.perf_counter() - begin
    model, repeated = _FLOPS[mode](config, mesh)
    return Estimate(
        config, mesh, chip, fits, given, temporaries, peak, aliased,
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)), model, repeated, sent,
        seconds, feed, prediction,
    )  # fmt: skip


def compile_scheduled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program compiled for TPU, and its scheduled HLO.

    The text is the compiler's dump: jaxlib 0.10.2 cannot parse what libtpu 0.0.52 gives for collectives
    on a SparseCore, of which `as_text` fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dump)
        dumped = next(Path(folder).glob("*.after_codegen.txt"), None)
        # None if the program is from jax's cache of compiled programs.
        return compiled, dumped.read_text(encoding="utf-8") if dumped else compiled.as_text()


def _kernels(
    config: Config, mesh: Mesh, topology: str, feed: Feed | None, lowered: jax.stages.Lowered
) -> dict[str, float]:
    """Seconds of a call of each attention kernel in a train step; empty if it has none."""
    if feed is None or "interval_attention_forward" not in lowered.as_text():
        return {}
    rows = config.batch_size // config.optimizer.grad_accum_steps // batch_shards(mesh)
    try:
        return kernel_seconds(config.model, mesh, topology, feed.content.masks, rows)
    except RuntimeError as error:  # a compiler whose dump is another
        print(f"WARNING: attention kernels count as 0 ms: {error}", file=sys.stderr, flush=True)
        return {}


def _parse_oom_bytes(message: str) -> int:
    """Parses the bytes of temporaries from the compiler's out-of-memory message."""
    number, unit = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message).groups()
    return int(float(number) * UNITS[unit])


def _train_program(config: Config, mesh: Mesh, dtype: str):
    fields = contract.spec(config.layout, config.batch_size, config.data.max_seq_len)
    batch = _placed(fields, NamedSharding(mesh, BATCH))
    return make_train_step(config, mesh), (abstract_train_state(config, mesh), batch)


def _train_flops(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Model FLOPs of a step, counting every token as a text target and a patch, in rows of one causal
    document; and FLOPs of the blocks alone, including remat."""
    c, length, model = config.model, config.data.max_seq_len, get_model(config.model)
    tokens = config.batch_size * length
    pairs = config.batch_size * length * (length + 1) // 2
    every = model.flops(c, tokens=tokens, pairs=pairs, patches=tokens, text=tokens)
    blocks = TRAINING * model.flops(c, tokens=tokens) + model.recomputed_flops(c, tokens)
    return TRAINING * every, blocks


def _placed(tree, sharding: NamedSharding):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _sample_program(config: Config, mesh: Mesh, dtype: str):
    """The denoising loop of `sample` for a batch of images, after prefill."""
    images, sampling = _images(mesh), config.image_sampling()
    branches = image.guidance_branches(sampling, shown=False)
    spec = image.make_image_spec(config.model, sampling, (config.data.image_size,) * 2, branches)
    params = abstract_weights(config.model, dtype, mesh)
    state = abstract_state(config, images * branches, PROMPT, mesh)
    keys = jax.eval_shape(lambda: row_keys(0, images))
    x = jax.ShapeDtypeStruct((images, spec.patches, config.layout.patch_dim), "float32")
    x, keys = _placed((x, keys), NamedSharding(mesh, BATCH))
    program = image.denoise_program(compiler_options(config.compiler_options, mesh.devices.flat[0]))
    return program, (params, state, x, keys, *image.denoise_settings(sampling), spec)


def _sample_flops(config: Config, mesh: Mesh) -> tuple[int, int]:
    """FLOPs of the images of one call, and of the blocks alone."""
    c, s, n, model = config.model, config.sampling, config.image_tokens, get_model(config.model)
    steps = _solver_steps(config)
    calls = _images(mesh) * steps * EVALUATIONS[s.solver] * image.guidance_branches(s, shown=False)
    every = model.flops(c, tokens=n, pairs=n * (n + PROMPT), patches=n)
    return calls * every, calls * model.flops(c, tokens=n)


def _solver_steps(config: Config) -> int:
    s = config.image_sampling()
    return int(make_time_grid(s.solver, s.steps, s.shift).steps)


def _images(mesh: Mesh) -> int:
    return IMAGES * batch_shards(mesh)


_PROGRAMS = {"train": _train_program, "sample": _sample_program}
_FLOPS = {"train": _train_flops, "sample": _sample_flops}
MODES = tuple(_PROGRAMS)
