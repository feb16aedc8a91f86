"""Predicts, without a TPU, whether a run fits a TPU slice, and the time of its step.

  python -m monoformer_jax.plan --config=configs/imagenet256.py --topology=v5e:8x8
  python -m monoformer_jax.plan --config=configs/imagenet256.py --topology=v6e:4x4 \\
      --mesh data=2,fsdp=8 --config.batch_size=64 --json plan.json

The training step (the sampler with --mode=sample) is compiled ahead of time with libtpu, which
`pip install 'monoformer_jax[plan]'` installs; memory is as reported by the compiler, and the step is
predicted from the compiler's schedule. If the run does
not fit, config changes that may make it fit are compiled too, those that fit are suggested, and the
exit code is 2.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from monoformer_jax.cli import (
    finite,
    integer,
    load_config,
    local_path,
    run_command,
    storage_path,
)
from monoformer_jax.config import Config
from monoformer_jax.errors import BAD_INPUT, InputError, require
from monoformer_jax.files import atomic_write, check_output, json_with, write_json

if TYPE_CHECKING:
    from monoformer_jax.planning.estimate import Estimate

SUGGESTIONS = 3
LARGEST = 8  # collectives that are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config of the run")
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE",
        help="slice to compile for: v4, v5e, v5p, v6e or tpu7x and its shape in chips, as in v5e:8x8 "
        "or v5p:2x2x4; with --config.mesh.slices=N, each of the N slices",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", metavar="AXIS=N,…", help="overrides the mesh of the config: data=2,fsdp=8"
    )
    parser.add_argument("--mode", choices=("train", "sample"), default="train")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights that are sampled from, as in sample (default float32)",
    )  # fmt: skip
    parser.add_argument(
        "--price", type=finite, metavar="DOLLARS", help="of a chip for an hour, to print the cost"
    )
    parser.add_argument(
        "--picture", type=local_path, metavar="FILE.png",
        help="draw the schedule of a block's backward pass: compute above, collectives below",
    )  # fmt: skip
    parser.add_argument(
        "--choose", type=local_path, metavar="FILE",
        help="compile several remat sets and meshes, and write the config values with the least "
        "predicted step that leave a tenth of HBM free, as arguments of train",
    )  # fmt: skip
    parser.add_argument(
        "--search",
        type=integer(1),
        default=6,
        metavar="N",
        help="of --choose: candidates (default 6)",
    )
    parser.add_argument(
        "--rows", type=integer(1), nargs="+", default=[], metavar="N",
        help="of --choose: rows a chip to try; they change batch_size (default: that of the config)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=finite, default=60.0, help="of --choose: its longest time (default 60)"
    )
    parser.add_argument(
        "--json", type=storage_path, metavar="FILE", help="write the estimate to this file"
    )


def main(args: argparse.Namespace) -> int:
    axes = args.mesh.split(",") if args.mesh else []
    if axes:  # axes that are not named default to 1, but data to the remaining devices
        rest = 1 if "-1" in args.mesh else -1
        axes = [f"data={rest}", "fsdp=1", "tensor=1", *axes]
    overrides = [*args.overrides, *(f"--config.mesh.{axis}" for axis in axes)]
    config = load_config(args.config, overrides)
    if args.json:
        check_output(args.json, "--json", json_with("fits", "hbm_gib"))
    require(
        args.mode == "train" or not (args.price or args.picture or args.choose),
        "--price, --picture and --choose are for --mode=train, whose step is predicted",
    )
    if args.choose:
        check_output(args.choose, "--choose", _is_choice)
    if args.picture:
        check_output(args.picture, "--picture", lambda path: path.suffix == ".png")
    require(args.price is None or args.price > 0, f"--price={args.price} must be above 0")
    from monoformer_jax.planning.estimate import argument_bytes, default_mesh, estimate

    if args.choose:
        _choose(args, config)
        return 0
    if args.mode == "sample" and not args.mesh:
        mesh = default_mesh(config, args.topology, args.dtype)
        config = dataclasses.replace(config, mesh=mesh)
    found = estimate(config, args.topology, args.mode, args.dtype)
    print("\n".join(describe(found, args.topology, args.mode, args.price)), flush=True)
    if args.json:
        write_json(args.json, found.to_json())
    if args.picture and found.prediction is not None:
        from monoformer_jax.planning.picture import save_schedule

        save_schedule(args.picture, found.prediction)
    if found.fits:
        return 0
    print("\nThe run does not fit. Trying config changes:", flush=True)
    fitting = suggest(
        found,
        lambda changed: estimate(changed, args.topology, args.mode, args.dtype),
        lambda changed: argument_bytes(changed, args.topology, args.mode, args.dtype),
        args.mode,
    )
    for text, one in fitting:
        print(f"{one.peak / 2**30:.2f} GiB, {1e3 * one.floor:.4g} ms per step at least: {text}")
    if not fitting:
        print("no change fits: use a larger slice, a smaller batch or a smaller max_seq_len")
    return BAD_INPUT


def _is_choice(path) -> bool:
    return path.read_text(encoding="utf-8").startswith("--config.")


def _choose(args: argparse.Namespace, config: Config) -> None:
    """Searches, and writes the arguments of the best candidate to args.choose."""
    from monoformer_jax.planning.choose import arguments, candidates, choose, search
    from monoformer_jax.planning.estimate import estimate, slice_mesh

    chips = slice_mesh(config, args.topology).size
    changes = list(itertools.islice(candidates(config.to_dict(), chips, args.rows), args.search))
    print(f"compiling up to {len(changes)} candidates for {args.topology}:", flush=True)
    best = choose(
        search(
            config.to_dict(), changes, args.topology, minutes=args.minutes,
            estimate=lambda changed: estimate(changed, args.topology).to_json(),
            cache=args.choose.with_name(f"{args.choose.name}.compiled.json"),
        )
    )  # fmt: skip
    values = arguments(best.change)
    with atomic_write(args.choose) as staging:
        staging.write_text("\n".join(values) + "\n", encoding="utf-8")
    print(f"predicted {best.found['predicted_step_ms']:.1f} ms a step: {' '.join(values)}")
    print(f"written; train with --config={args.config} $(cat {args.choose})")


def describe(
    found: Estimate, topology: str, mode: str, price: float | None = None
) -> Iterator[str]:
    """Yields the lines of the report; `price` is that of a chip for an hour."""
    from monoformer_jax.parallel import describe_mesh
    from monoformer_jax.sampling.sampler import IMAGES

    config, chip, mesh = found.config, found.chip, found.mesh
    model = f"{found.parameters / 1e6:,.1f} M parameters"
    where = f"{mesh.size} devices, mesh {describe_mesh(mesh)}, {mode}"
    yield f"{config.name} on {topology}: {model}, {where}"
    yield f"compiled in {found.compile_seconds:.0f} s"
    yield "memory of a device, GiB"
    for name, size in (
        ("arguments", found.arguments),
        ("temporaries", found.temporaries),
        ("peak", found.peak),
    ):
        yield f"  {name:<12}{size / 2**30:9.3f}"
    free = 1 - found.peak / 2**30 / chip.hbm_gib
    yield f"  {'HBM':<12}{chip.hbm_gib:9.3f}   " + (
        f"{free:.0%} free" if found.fits else "TOO SMALL"
    )
    if not found.fits:
        return
    unit = "step" if mode == "train" else f"call for {IMAGES} images per device"
    yield f"collectives of a {unit}: kind, mesh axes, runs, MB that a device sends"
    totals: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    for one in found.sent:
        key = (one.kind, "+".join(one.axes))
        totals[key] += one.sent / 1e6
        calls[key] += one.times
    for (kind, over), size in totals.most_common():
        yield f"  {kind:<20}{over:<12}{calls[kind, over]:>7}{size:12.1f}"
    yield from _times(found, mode, unit)
    if found.prediction is not None:
        yield from _predicted(found, price)


def _times(found: Estimate, mode: str, unit: str) -> Iterator[str]:
    config, chip = found.config, found.chip
    compute, hbm, ici = (1e3 * seconds for seconds in found.floors().values())
    yield f"a {unit} takes at least the largest of three, ms"
    yield f"  compute {compute:10.4g}   products of the blocks at {chip.tflops:g} TFLOP/s in bfloat16"
    yield f"  HBM     {hbm:10.4g}   state read and written once at {chip.hbm_gbs:g} GB/s"
    yield f"  ICI     {ici:10.4g}   collectives over the links that each can use, at full speed"
    yield f"model FLOPs of a {unit}: {found.flops:.3e}"
    if mode == "sample":
        return
    tokens = config.batch_size * config.data.max_seq_len
    images = config.batch_size * config.max_images
    for share in (0.4, 0.5):
        seconds = found.seconds_at(share)
        hours = seconds * config.steps / 3600
        yield (
            f"  at {share:.0%} of peak: {1e3 * seconds:.4g} ms a step, "
            f"{tokens / seconds:,.0f} tokens/s, up to {images / seconds:,.0f} images/s, "
            f"{config.steps:,} steps in {hours:,.1f} h"
        )
    yield from _feed(found)


def _predicted(found: Estimate, price: float | None) -> Iterator[str]:
    """The predicted step: its parts, the collectives that are waited for, and the useful rates."""
    config, one, rows = found.config, found.prediction, found.feed.content
    yield f"predicted step, ms: {1e3 * one.seconds:.1f}   from the schedule; nothing was timed"
    for name, seconds in sorted(one.compute.items(), key=lambda pair: -pair[1]):
        yield f"  {name:<16}{1e3 * seconds:8.2f}"
    yield f"  {'exposed ICI':<16}{1e3 * one.exposed:8.2f}   {1e3 * one.synchronous:.2f} synchronous"
    yield "collectives by exposed time: kind, mesh axes, largest array, runs, MB, GB/s, ms, exposed"
    transfers = sorted(one.transfers, key=lambda x: -x.exposed * x.collective.times)
    for transfer in transfers[:LARGEST]:
        c = transfer.collective
        beside = f"beside {transfer.hidden_by}" if transfer.asynchronous else "synchronous"
        yield (
            f"  {c.kind:<14} {'+'.join(c.axes):<10}{c.shape:<18}{c.times:>5}{c.sent / 1e6:10.1f}"
            f"{transfer.gbs:6.0f}{1e3 * transfer.seconds * c.times:8.2f}"
            f"{1e3 * transfer.exposed * c.times:8.2f}  {beside}"
        )
    tokens = rows.real_token_share * config.batch_size * config.data.max_seq_len
    yield (
        f"useful: MFU {found.useful_mfu:.1%}, {tokens / one.seconds:,.0f} tokens/s, "
        f"{found.useful_images_per_s:,.0f} images/s, of {rows.real_token_share:.0%} real tokens"
        + (" (rows of images with short prompts are assumed)" if rows.assumed else "")
    )
    hours = config.steps * one.seconds / 3600
    cost = f", ${hours * found.mesh.size * price:,.0f} at ${price:g} a chip-hour" if price else ""
    yield f"  {config.steps:,} steps in {hours:,.1f} h{cost}"


def _feed(found: Estimate) -> Iterator[str]:
    from monoformer_jax.planning.estimate import FED

    feed, seconds = found.feed, found.seconds_at(FED)
    yield f"hosts: {feed.hosts}, streams: {found.config.streams}"
    known = feed.real_token_share is not None
    yield (
        f"  at {FED:.0%} of peak a host must make {feed.rows:g} rows in {1e3 * seconds:.4g} ms: "
        f"{'' if known else 'up to '}{feed.images_per_s(seconds):,.0f} images/s"
    )
    yield "  " + (
        f"packed rows: {feed.real_token_share:.0%} real tokens, {feed.images_per_row:.2f} images"
        if known
        else "real tokens are not known: the records or the tokenizer are not here"
    )


def changes(config: Config, mode: str) -> list[dict[str, str]]:
    """Config overrides that may save memory: each alone, cheapest first, then cumulatively."""
    from monoformer_jax.parallel import DATA_AXIS, FSDP_AXIS

    c, mesh, model = config.optimizer, config.mesh, config.model
    rows = mesh.data * mesh.fsdp
    found = []
    if mesh.data > mesh.slices:
        found.append({"mesh.data": mesh.slices, "mesh.fsdp": rows // mesh.slices})
    if mode == "train" and c.first_moment_dtype != "bfloat16":
        found.append({"optimizer.first_moment_dtype": "bfloat16"})
    if mode == "train" and model.remat != "nothing_saveable":
        found.append({"model.remat": "nothing_saveable"})
    for times in (2, 4, 8):
        if mode == "train" and config.batch_size % (c.grad_accum_steps * times * rows) == 0:
            found.append({"optimizer.grad_accum_steps": c.grad_accum_steps * times})
    together = [functools.reduce(operator.or_, found[: n + 1]) for n in range(1, len(found))]
    if rows % 2 == 0:
        axis = FSDP_AXIS if mesh.fsdp % 2 == 0 else DATA_AXIS
        found.append({f"mesh.{axis}": getattr(mesh, axis) // 2, "mesh.tensor": 2 * mesh.tensor})
    return found + together


def suggest(
    found: Estimate,
    try_: Callable[[Config], Estimate],
    arguments_of: Callable[[Config], int],
    mode: str,
) -> list[tuple[str, Estimate]]:
    """Returns up to three changes that fit, with their estimates, by increasing step time.

    Args:
      found: the estimate of the run that does not fit.
      try_: compiles a config and returns its estimate.
      arguments_of: returns the bytes of a config's arguments per device, without compiling.
      mode: "train" or "sample".

    Returns:
      (command-line overrides, estimate) pairs.
    """
    from monoformer_jax.planning.choose import with_values

    sizes = dict(found.mesh.shape)
    config = dataclasses.replace(found.config, mesh=dataclasses.replace(found.config.mesh, **sizes))
    fitting = []
    for change in changes(config, mode):
        text = " ".join(f"--config.{key}={value}" for key, value in change.items())
        try:
            changed = with_values(config.to_dict(), change)
            arguments = arguments_of(changed)
            one = None
            if arguments + _least(found, changed, arguments) <= found.chip.hbm_gib * 2**30:
                one = try_(changed)
        except InputError as error:
            print(f"  invalid: {text}: {error}", flush=True)
            continue
        verdict = "too large" if one is None else "fits" if one.fits else "does not fit"
        print(f"  {verdict}: {text}", flush=True)
        if one is not None and one.fits:
            fitting.append((text, one))
        if len(fitting) == SUGGESTIONS:
            break
    return sorted(fitting, key=lambda pair: (pair[1].floor, sum(pair[1].floors().values())))


def _least(found: Estimate, changed: Config, arguments: int) -> float:
    """Lower bound of a changed config's temporaries in bytes, to skip compiling what cannot fit."""
    old = found.config
    if changed.model.remat != old.model.remat or changed.mesh.tensor != old.mesh.tensor:
        return 0
    # Gradients shrink with the state's shards, activations with the micro-batch.
    kept = found.temporaries - max(found.arguments - arguments, 0)
    return kept * old.optimizer.grad_accum_steps / changed.optimizer.grad_accum_steps


if __name__ == "__main__":
    run_command("plan", __doc__, add_arguments, main)
