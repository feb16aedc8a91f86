"""Words around what a user says: the chat template, and prompts for the classes of ImageNet.

They are what the released weights were trained on, so their words matter more than their style.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from monoformer_jax.errors import require

CHAT_TEMPLATE = ("### Human: {}### Assistant: ", "{}")  # what is asked, what is answered

IMAGENET_TEMPLATES = (
    "Please generate an image of {}.",
    "{}",
    "an image of {}.",
    "an photo of {}.",  # as trained
)
# Two names stand for two classes each: with the name alone the model cannot know which is meant.
_AMBIGUOUS = {134: "crane (bird)", 517: "crane (machine)",
              638: "maillot (one-piece suit)", 639: "maillot (tank suit)"}  # fmt: skip


def apply_chat_template(message: str) -> str:
    """A message as the original's chat template has it, ready to be answered."""
    return CHAT_TEMPLATE[0].format(message.strip())


def class_prompts(label: str) -> list[str]:
    """Every way in which training asks for a class."""
    return [template.format(label) for template in IMAGENET_TEMPLATES]


def read_labels(path: Path) -> list[str]:
    """The 1000 names of a JSON list or {"number": name}, in which no two classes share a name.

    Raises:
      InputError: no such file, not 1000 names, or two classes of one name.
    """
    require(path.is_file(), f"there is no file of labels {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        values = None
    if isinstance(values, dict):
        values = [values.get(str(i)) for i in range(len(values))]
    fits = isinstance(values, list) and all(isinstance(v, str) for v in values)
    require(fits and len(values) == 1000, f"{path} is no JSON list of the 1000 names of ImageNet")
    return disambiguate(values)


def disambiguate(labels: Sequence[str]) -> list[str]:
    """The names with crane and maillot told apart, wherever a name stands for two classes.

    Raises:
      InputError: other classes share a name.
    """
    count = Counter(labels)
    told = [
        _AMBIGUOUS.get(number, label) if count[label] > 1 else label
        for number, label in enumerate(labels)
    ]
    shared = [label for label, times in Counter(told).items() if times > 1]
    require(not shared, f"two classes share the name {', '.join(shared)}")
    return told
