"""Measures a trained model: its losses on held-out examples, its digits, its emoji; and any pictures.

  python -m monoformer_jax.evaluate --workdir=runs/digits --json=runs/digits/scores.json
  python -m monoformer_jax.evaluate --workdir=runs/pictures --checkpoint=best
  python -m monoformer_jax.evaluate --workdir=runs/pictures --records=records/others
  python -m monoformer_jax.evaluate --workdir=runs/digits --seeds=3
  python -m monoformer_jax.evaluate --images=fid/samples.npz --inception=inception.pth \\
      --reference=VIRTUAL_imagenet256_labeled.npz
  python -m monoformer_jax.evaluate --images=pictures --clip=clip-vit-large-patch14

Losses, of any run: text (nats per token) and images (mean over noise levels, with fixed noise), on the
examples that the run held out (data.validation_split or data.validation_records), or on those of
--records. They are those of its metrics.jsonl at the same step.

Drawings, of any run with held-out prompts and pictures: up to --drawings prompts are drawn, and
compared with the pictures, as below. What cannot be measured is said.

Digits, of a run with the source draw: SVM accuracy on 500 generated digits, Fréchet distance of 500
unguided ones, accuracy in reading the 360 test digits and completing the training sentences, and the
share of prompts to draw that are answered with exactly one image; of a model without a text head, the
generated digits alone. With the source page also pages: whether the next digit is generated behind a
test digit, and whether two of them are named.

Emoji, of a run with the source draw_emoji: drawings of the held-out captions and of 80 trained ones,
and the names of those pictures. A drawing is right if the nearest of all pictures of the subset has the
base and the attributes of its caption.

Pictures (--images) are compared with those of --reference, each a folder or a .npz file: with the
weights of FID's InceptionV3 (--inception) FID, sFID, KID, precision, recall and Inception Score;
without them the same distances of pixels, which are not FID. Several --images are sets of several
seeds: the figures are their mean and spread. With --workdir they are recorded there, as of a run.
--clip adds the CLIP score of pictures and their prompts, of --images (which then needs no --reference)
and of drawings.

--tasks=hellaswag,arc_easy runs tasks of the lm-evaluation-harness, which fetches their data.

Every evaluation of a run becomes a line of evaluations.jsonl in the workdir (or --out), with what the
figures stand on, and is shown in report.html.

Of a run it writes loss.png, samples.png of digits and emoji.png, into the workdir or --out. A file of
that name is replaced only if this command wrote it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from monoformer_jax.cli import (
    checkpoint_step,
    integer,
    local_path,
    model_path,
    run_command,
    storage_path,
)
from monoformer_jax.errors import InputError, require

_WRITER = "monoformer_jax evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=model_path, help="folder of the trained run, or showcase with --out")
    add("--checkpoint", type=checkpoint_step, metavar="N|best",
        help="its step, or best: that with the lowest held-out loss (default: the newest)")  # fmt: skip
    add("--records", type=storage_path, metavar="DIR",
        help="records whose losses are measured, instead of those that the run held out")  # fmt: skip
    add("--rows", type=integer(1), metavar="N",
        help="packed rows that are measured, at most (default: validation.rows)")  # fmt: skip
    add("--drawings", type=integer(0), default=64, metavar="N",
        help="held-out prompts that are drawn, at most; 0 is off (default 64)")  # fmt: skip
    add("--seeds", type=integer(1), default=1, metavar="N",
        help="seeds of what is drawn: figures are means, with their spread (default 1)")  # fmt: skip
    add("--vae", type=local_path, metavar="DIR",
        help="folder of the autoencoder, for the drawings of a latent model")  # fmt: skip
    add(
        "--out", type=storage_path, metavar="DIR", help="folder of the figures (default: --workdir)"
    )
    add("--json", type=storage_path, metavar="FILE", help="write the scores to this file")
    add("--images", type=storage_path, action="append", metavar="DIR|FILE.npz",
        help="pictures that are measured, in place of a model; may be repeated")  # fmt: skip
    add("--reference", type=storage_path, metavar="DIR|FILE.npz",
        help="pictures, or statistics of Inception features, that they are compared with")  # fmt: skip
    add("--inception", type=local_path, metavar="FILE",
        help="weights of FID's InceptionV3, such as pt_inception-2015-12-05-6726825d.pth")  # fmt: skip
    add("--resize", choices=("adm", "pytorch_fid", "clean_fid"), default="adm",
        help="whose resize to 299 pixels: part of the name of every FID (default adm)")  # fmt: skip
    add("--pixels", type=integer(1, 256), metavar="SIDE",
        help="side of the small pictures whose pixels are compared (default 16)")  # fmt: skip
    add("--clip", type=local_path, metavar="DIR",
        help="a complete CLIP, such as clip-vit-large-patch14, for the CLIP score")  # fmt: skip
    add("--prompts", type=local_path, metavar="FILE",
        help="prompts of --images in their order (default: those in the record of sample)")  # fmt: skip
    add("--tasks", metavar="NAME,NAME",
        help="tasks of the lm-evaluation-harness (extra eval), in place of other figures")  # fmt: skip
    add("--task_folder", type=local_path, metavar="DIR", help="folder of more task files, YAML")
    add("--limit", type=integer(1), metavar="N", help="examples of each task, at most")
    add("--statistics", type=storage_path, metavar="FILE.npz",
        help="write the statistics of --reference to this file, which --reference takes")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    require(
        args.workdir is not None or args.images is not None,
        "give --workdir, a trained run, or --images and --reference",
    )
    if args.workdir is not None and args.out is None:
        from monoformer_jax.runtime.workdir import SHIPPED

        require(
            args.workdir.parent != SHIPPED,
            f"--workdir={args.workdir.name} is part of the package: give a folder of figures, --out",
        )
    if args.images is not None:
        _compare(args)
    elif args.tasks is not None:
        _run_tasks(args)
    else:
        _measure(args)


def _compare(args: argparse.Namespace) -> None:
    """Figures of the sets --images: beside --reference, and beside their prompts."""
    from monoformer_jax.evaluation import features, record, tables
    from monoformer_jax.evaluation.clip_score import ClipScore
    from monoformer_jax.evaluation.image_set import open_image_set
    from monoformer_jax.evaluation.prompts import prompts_of
    from monoformer_jax.evaluation.report import add_evaluations
    from monoformer_jax.files import check_output, check_writable, json_with, write_json

    require(
        args.reference is not None or args.clip is not None,
        "--images needs --reference, pictures that they are compared with, or --clip",
    )
    require(
        args.prompts is None or args.clip is not None, "--prompts is of the CLIP score: give --clip"
    )
    names = ("checkpoint", "records", "rows", "out", "vae", "tasks")
    unused = [name for name in names if getattr(args, name) is not None]
    require(
        not unused, f"--{unused and unused[0]} is of a model: leave it out, or leave out --images"
    )
    require(args.seeds == 1, "--seeds draws with a model: of pictures, give --images once per seed")
    if args.json:
        check_output(args.json, "--json", json_with("extractor", "count"))
    if args.statistics:
        require(args.reference is not None, "--statistics are those of --reference: give it")
        require(
            args.statistics.suffix == ".npz", f"--statistics={args.statistics} must end in .npz"
        )
        check_output(args.statistics, "--statistics", features.are_our_statistics)
    if args.workdir:
        check_writable(args.workdir, "--workdir")
    sets = [open_image_set(path) for path in args.images]
    reference = None if args.reference is None else open_image_set(args.reference)
    for images in sets:
        require(images.has_images, f"--images={images.source} has statistics and no pictures")
        features.check_sizes(images, sets[0])
        if reference is not None:
            features.check_sizes(images, reference)
    prompts = [prompts_of(images, args.prompts) for images in sets] if args.clip else []
    clip = ClipScore(args.clip) if args.clip else None
    extractor = features.open_extractor(sets[0], args.inception, args.resize, args.pixels)
    against = None if reference is None else features.extract(reference, extractor, "reference")
    if args.statistics:
        features.write_statistics(args.statistics, against, reference, extractor)
    found, facts = [], []
    for number, images in enumerate(sets):
        measured = features.extract(images, extractor, images.source.name)
        found.append(features.compare(measured, against))
        if clip is not None:
            found[-1]["clip_score"] = clip.score(images, prompts[number])
        facts.append({"images": str(images.source), "images_sha256": measured.digest}
                     | record.made_by_sample(images.source))  # fmt: skip
    scores = record.with_spread(found)
    provenance = {"extractor": extractor.name, "count": measured.count}
    if against is not None:
        provenance |= {"reference": str(args.reference), "reference_sha256": against.digest,
                       "reference_count": against.count or None}  # fmt: skip
    if clip is not None:
        provenance |= {"clip": clip.name, "prompts_cut": clip.cut}
    provenance |= record.common(facts)
    for sentence in features.cautions(measured, against) if against is not None else ():
        print(f"note: {sentence}")
    print("\n".join(tables.lines(tables.of_pictures(scores, provenance), scores)))
    print(", ".join(f"{key} {value}" for key, value in provenance.items()))
    if args.json:
        write_json(args.json, scores | provenance)
    if args.workdir:
        record.append(args.workdir, scores, provenance)
        add_evaluations(args.workdir)


def _run_tasks(args: argparse.Namespace) -> None:
    """Tasks of the lm-evaluation-harness for the model in --workdir."""
    import monoformer_jax
    from monoformer_jax.evaluation import record
    from monoformer_jax.evaluation.report import add_evaluations
    from monoformer_jax.files import check_output, check_writable, json_with, write_json

    if args.json:
        check_output(args.json, "--json", json_with("harness", "tasks"))
    folder = args.out or args.workdir
    check_writable(folder, "--out")
    try:
        from monoformer_jax.evaluation import harness
    except ImportError as error:
        raise InputError(
            f"--tasks needs the lm-evaluation-harness ({error}): pip install 'monoformer_jax[eval]'"
        ) from error
    model = monoformer_jax.load(args.workdir, checkpoint=args.checkpoint)
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    scores, facts = harness.evaluate(model, tasks, args.task_folder, args.limit)
    facts |= {"workdir": str(args.workdir), "checkpoint_step": model.step, "ema": True}
    for key, value in scores.items():
        print(f"{key:<40} {value:>8.4f}")
    record.append(folder, scores, facts)
    add_evaluations(folder)
    if args.json:
        write_json(args.json, scores | facts)


def _measure(args: argparse.Namespace) -> None:
    """Figures of the model in --workdir: what its data supports."""
    import monoformer_jax
    from monoformer_jax.data.digits import NAMES
    from monoformer_jax.evaluation import digits, emoji, plots, record, tables
    from monoformer_jax.evaluation.report import add_evaluations
    from monoformer_jax.files import check_output, json_with, write_json
    from monoformer_jax.runtime.workdir import read_config
    from monoformer_jax.sampling.outputs import pictures_of, write_picture

    if args.json:
        check_output(args.json, "--json", json_with("steps", "train_seconds"))
    names = ("reference", "statistics", "prompts")
    unused = [name for name in names if getattr(args, name) is not None]
    require(not unused, f"--{unused and unused[0]} needs --images, the pictures that it is of")
    config = read_config(args.workdir)
    is_digits = config.data.mixture.get("draw", 0) > 0 and "draw" not in config.data.records
    is_emoji = config.data.mixture.get("draw_emoji", 0) > 0
    require(
        is_digits or is_emoji or config.holds_out or args.records is not None,
        f"{args.workdir} held out no example: give --records=DIR, examples that it was not trained on",
    )
    folder = args.out or args.workdir
    samples, compared, curves = (folder / f"{x}.png" for x in ("samples", "emoji", "loss"))
    for figure in [samples] * is_digits + [compared] * is_emoji + [curves]:
        check_output(figure, "--out", pictures_of(_WRITER))
    vae = args.vae
    if vae is None and config.validation.vae and Path(config.validation.vae).is_dir():
        vae = config.validation.vae  # else the run was trained elsewhere
    model = monoformer_jax.load(args.workdir, vae=vae, checkpoint=args.checkpoint)
    scores, figures, provenance = {}, [], {}
    if config.holds_out or args.records is not None:
        scores, provenance = _held_out(model, args, draws=not (is_digits or is_emoji))
    if is_digits:
        measured, drawn = digits.evaluate(model, print, args.seeds)
        scores |= measured
        grid = plots.digit_grid(drawn[:80], 10, NAMES[:10])
        write_picture(samples, plots.to_picture(grid), _WRITER)
        figures.append(samples)
    if is_emoji:
        measured, shown = emoji.evaluate(model, print, args.seeds)
        scores |= measured
        write_picture(compared, plots.to_picture(plots.comparison(*shown)), _WRITER)
        figures.append(compared)
    if is_digits or is_emoji:
        provenance["extractor"] = "pixels"  # of their Fréchet distances
    provenance |= {
        "workdir": str(args.workdir), "checkpoint_step": model.step, "ema": True,
        "seeds": args.seeds, **record.sampling_facts(dataclasses.asdict(model.config.sampling)),
    }  # fmt: skip
    record.append(folder, scores, provenance)
    scores |= {"steps": model.step, "train_seconds": model.train_seconds}
    if (args.workdir / "metrics.jsonl").exists():  # not of converted weights
        text = (args.workdir / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        write_picture(curves, plots.to_picture(plots.loss_curves(lines)), _WRITER)
        figures.append(curves)
    if args.json:
        write_json(args.json, scores | provenance)
    rows = [row for row in tables.LOSSES if row[1] in scores]
    rows += [*tables.DIGITS] * is_digits + [*tables.EMOJI] * is_emoji
    rows += [*tables.PAGES] * ("next_accuracy" in scores)
    if "heldout_kid" in scores:  # of drawn.evaluate
        rows += [*tables.DRAWN, *tables.of_pictures(scores, provenance, "heldout_")]
    print("\n".join(tables.lines([*rows, *tables.RUN], scores)))
    print(f"figures: {'  '.join(map(str, figures))}")
    add_evaluations(folder)


def _held_out(model, args: argparse.Namespace, draws: bool) -> tuple[dict[str, float], dict]:
    """The losses of a model, by their names in metrics.jsonl, and the figures of its drawings."""
    from monoformer_jax.evaluation import drawn, features
    from monoformer_jax.evaluation.clip_score import ClipScore
    from monoformer_jax.evaluation.held_out import HeldOutLoss, open_rows

    data = model.config.data
    if args.records is not None:
        given = {"given": str(args.records)}
        data = dataclasses.replace(
            data, mixture={"given": 1.0}, records=given, validation_records=given
        )
    held_out = open_rows(model, data, args.rows or model.config.validation.rows)
    print(f"measuring {len(held_out.rows)} rows of held-out examples")
    losses = HeldOutLoss(model, held_out.rows)(model.params)
    scores = {f"val_{key}": value for key, value in losses.items()}
    facts = {"rows": len(held_out.rows)} | ({"records": str(args.records)} if args.records else {})
    if not draws or args.drawings == 0:
        return scores, facts

    def open_extractor(images):
        return features.open_extractor(images, args.inception, args.resize, args.pixels)

    figures, provenance = drawn.evaluate(
        model, held_out.examples, args.drawings, args.seeds, open_extractor, print,
        ClipScore(args.clip) if args.clip else None,
    )  # fmt: skip
    return scores | figures, facts | provenance


if __name__ == "__main__":
    run_command("evaluate", __doc__, add_arguments, main)
