"""Measures a trained model: its losses on held-out examples, and the digits of a model of digits.

  python -m monoformer_jax.evaluate --workdir=runs/digits --json=runs/digits/scores.json
  python -m monoformer_jax.evaluate --workdir=runs/pictures --checkpoint=best
  python -m monoformer_jax.evaluate --workdir=runs/pictures --records=records/others

Losses, of any run: text (nats per token) and images (mean over noise levels, with fixed noise), on the
examples that the run held out (data.validation_split or data.validation_records), or on those of
--records. They are those of its metrics.jsonl at the same step.

Digits, of a run with the source draw: SVM accuracy on 500 generated digits, Fréchet distance of 500
unguided ones, accuracy in reading the 360 test digits and completing the training sentences, and the
share of prompts to draw that are answered with exactly one image; of a model without a text head, the
generated digits alone.

Writes loss.png, and samples.png of digits, into the workdir or --out. A file of that name is replaced
only if this command wrote it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from monoformer_jax.cli import checkpoint_step, integer, run_command, storage_path
from monoformer_jax.errors import require

_WRITER = "monoformer_jax evaluate"
_TABLE = (
    ("draw", "draw_accuracy", "generated digits that an SVM classifies as requested", "{:.1%}"),
    ("Fréchet", "frechet", "distance of 500 unguided digits to the test digits", "{:.2f}"),
    ("  of real", "frechet_real", "distance of 500 training digits to the test digits", "{:.2f}"),
    ("read", "read_accuracy", "test digits named correctly", "{:.1%}"),
    ("say", "say_accuracy", "sentences completed exactly", "{:.1%}"),
    ("opens", "opens_image", "prompts to draw answered with exactly one image", "{:.1%}"),
)
_LOSSES = (
    ("text", "val_text_loss", "cross-entropy of held-out text, nats per token", "{:.4f}"),
    ("image", "val_image_loss", "loss of held-out images, mean over noise levels", "{:.4f}"),
)
_RUN = (
    ("steps", "steps", "optimizer steps", "{}"),
    ("seconds", "train_seconds", "training time, compilation included", "{:.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=storage_path, required=True, help="folder of the trained run")
    add("--checkpoint", type=checkpoint_step, metavar="N|best",
        help="its step, or best: that with the lowest held-out loss (default: the newest)")  # fmt: skip
    add("--records", type=storage_path, metavar="DIR",
        help="records whose losses are measured, instead of those that the run held out")  # fmt: skip
    add("--rows", type=integer(1), metavar="N",
        help="packed rows that are measured, at most (default: validation.rows)")  # fmt: skip
    add(
        "--out", type=storage_path, metavar="DIR", help="folder of the figures (default: --workdir)"
    )
    add("--json", type=storage_path, metavar="FILE", help="write the scores to this file")


def main(args: argparse.Namespace) -> None:
    import monoformer_jax
    from monoformer_jax.data.digits import NAMES
    from monoformer_jax.evaluation import digits, plots
    from monoformer_jax.files import check_output, json_with, write_json
    from monoformer_jax.runtime.workdir import read_config
    from monoformer_jax.sampling.outputs import pictures_of, write_picture

    if args.json:
        check_output(args.json, "--json", json_with("steps", "train_seconds"))
    config = read_config(args.workdir)
    is_digits = config.data.mixture.get("draw", 0) > 0 and "draw" not in config.data.records
    require(
        is_digits or config.holds_out or args.records is not None,
        f"{args.workdir} held out no example: give --records=DIR, examples that it was not trained on",
    )
    folder = args.out or args.workdir
    samples, curves = folder / "samples.png", folder / "loss.png"
    for figure in (samples, curves) if is_digits else (curves,):
        check_output(figure, "--out", pictures_of(_WRITER))
    model = monoformer_jax.load(args.workdir, checkpoint=args.checkpoint)
    scores, figures = {}, []
    if config.holds_out or args.records is not None:
        scores |= _held_out(model, args)
    if is_digits:
        measured, drawn = digits.evaluate(model, print)
        scores |= measured
        grid = plots.digit_grid(drawn[:80], 10, NAMES[:10])
        write_picture(samples, plots.to_picture(grid), _WRITER)
        figures.append(samples)
    scores |= {"steps": model.step, "train_seconds": model.train_seconds}
    if (args.workdir / "metrics.jsonl").exists():  # not of converted weights
        text = (args.workdir / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        write_picture(curves, plots.to_picture(plots.loss_curves(lines)), _WRITER)
        figures.append(curves)
    if args.json:
        write_json(args.json, scores)
    shown = [row for row in _LOSSES if row[1] in scores] + list(_TABLE if is_digits else ())
    for name, key, meaning, form in [*shown, *_RUN]:
        value, why = (
            ("-", ": not measured, no text head")
            if key not in scores
            else (form.format(scores[key]), "")
        )
        print(f"{name:<10} {value:>8}   {meaning}{why}")
    print(f"figures: {'  '.join(map(str, figures))}")


def _held_out(model, args: argparse.Namespace) -> dict[str, float]:
    """The losses of a model, by their names in metrics.jsonl."""
    from monoformer_jax.evaluation.held_out import HeldOutLoss, open_rows

    data = model.config.data
    if args.records is not None:
        given = {"given": str(args.records)}
        data = dataclasses.replace(
            data, mixture={"given": 1.0}, records=given, validation_records=given
        )
    rows = open_rows(model, data, args.rows or model.config.validation.rows).rows
    print(f"measuring {len(rows)} rows of held-out examples")
    return {f"val_{key}": value for key, value in HeldOutLoss(model, rows)(model.params).items()}


if __name__ == "__main__":
    run_command("evaluate", __doc__, add_arguments, main)
