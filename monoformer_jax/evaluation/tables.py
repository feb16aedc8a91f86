"""What `evaluate` prints: a line for each figure, with its spread and its meaning.

A row of a table is (name, key of the scores, meaning, format).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

Row = tuple[str, str, str, str]

DIGITS = (
    ("draw", "draw_accuracy", "generated digits that an SVM classifies as requested", "{:.1%}"),
    ("Fréchet", "frechet", "distance of 500 unguided digits to the test digits", "{:.2f}"),
    ("  of real", "frechet_real", "distance of 500 training digits to the test digits", "{:.2f}"),
    ("read", "read_accuracy", "test digits named correctly", "{:.1%}"),
    ("say", "say_accuracy", "sentences completed exactly", "{:.1%}"),
    ("opens", "opens_image", "prompts to draw answered with exactly one image", "{:.1%}"),
)
PAGES = (
    ("next", "next_accuracy", "pages of a test digit continued with the next digit", "{:.1%}"),
    ("page", "page_accuracy", "pages of two test digits, both named correctly", "{:.1%}"),
)
EMOJI = (
    ("drawn", "heldout_both_right", "held-out captions: base and attributes right", "{:.1%}"),
    ("  base", "heldout_base_right", "base of the nearest picture right", "{:.1%}"),
    ("  attribute", "heldout_attribute_right", "attributes of the nearest picture right", "{:.1%}"),
    ("  top-1", "heldout_top1", "the truth is the nearest picture", "{:.1%}"),
    ("  top-5", "heldout_top5", "the truth is among the five nearest pictures", "{:.1%}"),
    ("  error", "heldout_pixel_error", "mean absolute difference from the truth", "{:.3f}"),
    ("memorised", "memorised_share", "nearer to a trained picture than to the truth", "{:.1%}"),
    ("Fréchet", "heldout_frechet", "distance to the held-out pictures, of pixels", "{:.2f}"),
    ("  trained", "heldout_frechet_train", "distance to the trained pictures", "{:.2f}"),
    (
        "modality",
        "heldout_opens_image",
        "held-out captions answered with exactly one image",
        "{:.1%}",
    ),
    ("named", "heldout_names_exact", "names of held-out pictures exact", "{:.1%}"),
    ("  base", "heldout_names_base", "base of the named picture right", "{:.1%}"),
    ("  attribute", "heldout_names_attribute", "attributes of the named picture right", "{:.1%}"),
    ("trained", "train_top1", "trained captions: the truth is the nearest picture", "{:.1%}"),
    ("  named", "train_names_exact", "names of trained pictures exact", "{:.1%}"),
)
_BASELINES = ("nearest_train", "random", "mean", "noisy_truth")
LOSSES = (
    ("text", "val_text_loss", "cross-entropy of held-out text, nats per token", "{:.4f}"),
    ("image", "val_image_loss", "loss of held-out images, mean over noise levels", "{:.4f}"),
)
_PICTURES = (
    ("FID", "frechet", "Fréchet distance of {extractor}", "{:.3f}"),
    ("sFID", "sfid", "the same of its spatial features", "{:.3f}"),
    ("KID", "kid", "kernel distance, mean of subsets of up to 1,000", "{:.6f}"),
    ("IS", "inception_score", "Inception Score, mean of parts of 5,000", "{:.2f}"),
    ("CLIP", "clip_score", "CLIP score, 100 times the cosine, by {clip}", "{:.2f}"),
    ("precision", "precision", "near a picture of the reference, k = 3", "{:.4f}"),
    ("recall", "recall", "of the reference, near a picture, k = 3", "{:.4f}"),
)
_OF_PIXELS = {"FID": "Fréchet", "KID": "kernel"}  # names of figures that are not Inception's
DRAWN = (
    ("drawn", "heldout_top1", "the held-out picture of a prompt is the nearest", "{:.1%}"),
    ("  top-5", "heldout_top5", "it is among the five nearest", "{:.1%}"),
    ("  error", "heldout_pixel_error", "mean absolute difference from it", "{:.3f}"),
)
RUN = (
    ("steps", "steps", "optimizer steps", "{}"),
    ("seconds", "train_seconds", "training time, compilation included", "{:.0f}"),
)


def of_pictures(
    scores: Mapping[str, float], provenance: Mapping, prefix: str = ""
) -> Iterator[Row]:
    """The rows of `features.compare`, whose keys have a prefix; figures of pixels are not named FID."""
    is_inception = provenance["extractor"].startswith("Inception")
    for name, key, meaning, form in _PICTURES:
        if f"{prefix}{key}" in scores:
            name = name if is_inception else _OF_PIXELS.get(name, name)
            yield name, f"{prefix}{key}", meaning.format(**provenance), form


def lines(rows: Iterable[Row], scores: Mapping[str, float]) -> Iterator[str]:
    """A line for each row; a figure that was not measured needs a text head."""
    for name, key, meaning, form in rows:
        if key not in scores:
            yield f"{name:<11} {'-':>8}   {meaning}: not measured, no text head"
            continue
        spread = f" ± {form.format(scores[f'{key}_spread'])}" if f"{key}_spread" in scores else ""
        value = form.format(scores[key])
        yield f"{name:<11} {value:>8}{spread}   {meaning}{_beside(scores, key, form)}"


def _beside(scores: Mapping[str, float], key: str, form: str) -> str:
    """The figures of what needs no model, beside that of the model."""
    plain = key.removeprefix("heldout_")
    found = {name: scores.get(f"{name}_{plain}") for name in _BASELINES}
    said = [f"{name} {form.format(value)}" for name, value in found.items() if value is not None]
    shown = said and (plain != key or key == "memorised_share")
    return f" ({', '.join(said)})" if shown else ""
