"""Measures a trained model and draws its pictures.

  python -m monoformer_jax.evaluate --workdir=runs/digits --json=runs/digits/scores.json

For a model of the digits: 500 drawn digits named by a support vector machine, the Fréchet distance of
500 unguided ones, the 360 held-out digits read, every sentence ended, and whether a prompt to draw is
answered with one image. It writes samples.png and loss.png into the workdir.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from monoformer_jax.cli import run_command

_TABLE = (
    ("draw", "draw_accuracy", "drawn digits that an SVM names as asked", "{:.1%}"),
    ("Fréchet", "frechet", "500 unguided drawings to the test digits", "{:.2f}"),
    ("  of real", "frechet_real", "500 real training digits to the test digits", "{:.2f}"),
    ("read", "read_accuracy", "test digits named exactly", "{:.1%}"),
    ("say", "say_accuracy", "sentences ended exactly", "{:.1%}"),
    ("opens", "opens_image", "prompts to draw answered with one image", "{:.1%}"),
    ("steps", "steps", "optimizer steps", "{}"),
    ("seconds", "train_seconds", "training, compiling included", "{:.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file")


def main(args: argparse.Namespace) -> None:
    import monoformer_jax
    from monoformer_jax.data.digits import NAMES
    from monoformer_jax.evaluation import digits, plots

    model = monoformer_jax.load(args.workdir)
    scores, drawn = digits.evaluate(model, print)
    scores |= {"steps": model.step, "train_seconds": model.train_seconds}
    samples, losses = args.workdir / "samples.png", args.workdir / "loss.png"
    plots.save_digit_grid(samples, drawn[:80], 10, NAMES[:10])
    plots.save_loss_curves(losses, args.workdir / "metrics.jsonl")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n")
    for name, key, meaning, form in _TABLE:
        print(f"{name:<10} {form.format(scores[key]):>8}   {meaning}")
    print(f"pictures: {samples}  {losses}")


if __name__ == "__main__":
    run_command("evaluate", __doc__, add_arguments, main)
