"""Prompt templates: the chat template, and prompts for the ImageNet classes.

The released weights were trained on these exact strings, errors included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from monoformer_jax.data.documents import EndOfTurn, Part, UntrainedText
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import read_json

_USER, _ASSISTANT = "### Human: ", "### Assistant: "
ROLES = ("user", "assistant", "system")

IMAGENET_TEMPLATES = (
    "Please generate an image of {}.",
    "{}",
    "an image of {}.",
    "an photo of {}.",  # sic, as trained
)
# Two ImageNet names are shared by two classes each; these names are unique.
_AMBIGUOUS = {134: "crane (bird)", 517: "crane (machine)",
              638: "maillot (one-piece suit)", 639: "maillot (tank suit)"}  # fmt: skip


def chat_parts(messages: Sequence[Mapping]) -> list[Part]:
    """Formats a conversation with the chat template of the original; every answer ends with </s>.

    Only answers have a loss.

    Args:
      messages: {"role": one of `ROLES`, "content": a text, or a list of texts and other parts}.
    """
    parts: list[Part] = []
    for message in messages:
        content = message["content"]
        content = [content] if isinstance(content, str) else list(content)
        if message["role"] == "assistant":
            parts += [*content, EndOfTurn()]
            continue
        turn = [UntrainedText(x) if isinstance(x, str) else x for x in content]
        if message["role"] == "user":
            turn = [UntrainedText(_USER), *turn, UntrainedText(_ASSISTANT)]
        parts += turn
    return parts


def complete_prompt(parts: Sequence[Part], end_of_prompt: bool) -> list[Part]:
    """Ends a prompt as in training: with data.end_of_prompt, </s> marks it as complete."""
    return [*parts, EndOfTurn()] if end_of_prompt else list(parts)


def class_prompts(label: str) -> list[str]:
    """Returns all training prompts of a class."""
    return [template.format(label) for template in IMAGENET_TEMPLATES]


def read_labels(path: Path) -> list[str]:
    """Reads 1000 class names from a JSON list or {"number": name} and makes them unique.

    Raises:
      InputError: no such file, not 1000 names, or two classes with the same name.
    """
    require(path.is_file(), f"the label file {path} does not exist")
    try:
        values = read_json(path)
    except InputError:
        values = None
    if isinstance(values, dict):
        values = [values.get(str(i)) for i in range(len(values))]
    fits = isinstance(values, list) and all(isinstance(v, str) for v in values)
    require(fits and len(values) == 1000, f"{path} is not a JSON list of 1000 ImageNet names")
    return disambiguate(values)


def disambiguate(labels: Sequence[str]) -> list[str]:
    """Makes the duplicate names "crane" and "maillot" unique.

    Raises:
      InputError: other classes have the same name.
    """
    count = Counter(labels)
    unique = [
        _AMBIGUOUS.get(number, label) if count[label] > 1 else label
        for number, label in enumerate(labels)
    ]
    shared = [label for label, times in Counter(unique).items() if times > 1]
    require(not shared, f"two classes share the name {', '.join(shared)}")
    return unique
