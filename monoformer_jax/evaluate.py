"""Evaluates a model trained on the digits and plots samples and losses.

  python -m monoformer_jax.evaluate --workdir=runs/digits --json=runs/digits/scores.json

Metrics: SVM accuracy on 500 generated digits, Fréchet distance of 500 unguided ones, accuracy in
reading the 360 test digits and completing the training sentences, and the share of prompts to draw that
are answered with exactly one image; of a model without a text head, the generated digits alone.
Writes samples.png and loss.png into the workdir.
"""

from __future__ import annotations

import argparse

from monoformer_jax.cli import local_path, run_command, storage_path

_TABLE = (
    ("draw", "draw_accuracy", "generated digits that an SVM classifies as requested", "{:.1%}"),
    ("Fréchet", "frechet", "distance of 500 unguided digits to the test digits", "{:.2f}"),
    ("  of real", "frechet_real", "distance of 500 training digits to the test digits", "{:.2f}"),
    ("read", "read_accuracy", "test digits named correctly", "{:.1%}"),
    ("say", "say_accuracy", "sentences completed exactly", "{:.1%}"),
    ("opens", "opens_image", "prompts to draw answered with exactly one image", "{:.1%}"),
    ("steps", "steps", "optimizer steps", "{}"),
    ("seconds", "train_seconds", "training time, compilation included", "{:.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=local_path, required=True, help="folder of the trained run"
    )
    parser.add_argument(
        "--json", type=storage_path, metavar="FILE", help="write the scores to this file"
    )


def main(args: argparse.Namespace) -> None:
    import monoformer_jax
    from monoformer_jax.data.digits import NAMES
    from monoformer_jax.evaluation import digits, plots
    from monoformer_jax.files import check_output, check_writable, json_with, write_json
    from monoformer_jax.runtime.workdir import read_config

    if args.json:
        check_output(args.json, "--json", json_with("steps", "train_seconds"))
    read_config(args.workdir)
    check_writable(args.workdir, "--workdir")
    model = monoformer_jax.load(args.workdir)
    scores, drawn = digits.evaluate(model, print)
    scores |= {"steps": model.step, "train_seconds": model.train_seconds}
    samples, losses = args.workdir / "samples.png", args.workdir / "loss.png"
    plots.save_digit_grid(samples, drawn[:80], 10, NAMES[:10])
    plots.save_loss_curves(losses, args.workdir / "metrics.jsonl")
    if args.json:
        write_json(args.json, scores)
    for name, key, meaning, form in _TABLE:
        value, why = (
            ("-", ": not measured, no text head")
            if key not in scores
            else (form.format(scores[key]), "")
        )
        print(f"{name:<10} {value:>8}   {meaning}{why}")
    print(f"figures: {samples}  {losses}")


if __name__ == "__main__":
    run_command("evaluate", __doc__, add_arguments, main)
