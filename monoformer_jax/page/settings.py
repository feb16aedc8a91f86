"""The settings of an answer, and the limits of what a visitor writes."""

from __future__ import annotations

import secrets
from typing import Any

from monoformer_jax.errors import require, require_unicode, whole_number

MOST_ANSWERS = 8  # to one message
MOST_CHARACTERS = 20_000  # of a message, or of a negative prompt
MOST_TOKENS = 4096  # of the text of an answer


def check_settings(
    *,
    remember: bool = False,
    count: int = 1,
    seed: int | None = None,
    max_tokens: int = 64,
    **sampling: Any,
) -> dict[str, Any]:
    """The settings of an answer, checked.

    Args:
      remember: whether the model also receives the earlier messages.
      count: how many answers to generate, if they have pictures.
      seed: of the first answer, the next one has the next seed; None: random.
      max_tokens, sampling: see `Model.chat`.
    """
    check_text(sampling.get("negative_prompt") or "", "the negative prompt")
    return {
        "remember": bool(remember),
        "count": whole_number(count, "pictures", 1, MOST_ANSWERS),
        "seed": secrets.randbelow(2**32)
        if seed is None
        else whole_number(seed, "seed", 0, 2**32 - 1),
        "max_tokens": whole_number(max_tokens, "max text tokens", 1, MOST_TOKENS),
        **sampling,
    }


def check_text(text: str, name: str) -> None:
    require_unicode(text, name)
    require(
        len(text) <= MOST_CHARACTERS,
        f"{name} has {len(text)} characters: write {MOST_CHARACTERS} at most",
    )
