"""Builds config dataclasses from nested values, such as those of a ConfigDict or of config.json."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from monoformer_jax.errors import InputError, require

# Renamed keys: old name -> new name.
RENAMED = {
    "checkpoints_kept": "max_to_keep",
    "checkpoint_keep_every": "keep_period",
    "data.row_length": "data.max_seq_len",
    "data.packing_bins": "data.packing_buffer",
    "data.moments": "data.sample_latents",
    "optimizer.accumulation": "optimizer.grad_accum_steps",
    "model.learn_sigma": "objective.learn_sigma",
    "model.time_conditioning": "model.original.time_conditioning",
    "model.image_head": "model.original.image_head",
    "model.position_embedding": "model.original.position_embedding",
    "model.context_images": "model.original.context_images",
    "model.bidirectional_images": "model.original.bidirectional_images",
}


def build(cls, values: Mapping[str, Any], prefix: str = ""):
    """Builds a dataclass, and nested ones, from nested mappings.

    Args:
      prefix: prefix of the keys in messages, such as "model.".

    Raises:
      InputError: an unknown key, a value of another type, or a value out of range.
    """
    hints = get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            close = [prefix + name for name in difflib.get_close_matches(key, hints, 1)]
            close = [RENAMED[prefix + key]] if prefix + key in RENAMED else close
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"unknown config key {prefix}{key}{hint}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            require(isinstance(value, Mapping), f"config key {prefix}{key} is a group of keys")
            value = build(kind, value, f"{prefix}{key}.")
        elif get_origin(kind) is Mapping:
            require(
                isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
                f"config key {prefix}{key}={value!r} is not a group of keys",
            )
            item = get_args(kind)[1]
            value = {name: _fit(f"{prefix}{key}.{name}", item, x) for name, x in value.items()}
        elif get_origin(kind) is tuple:
            require(
                isinstance(value, list | tuple),
                f"config key {prefix}{key}={value!r} is not a list, such as ['a cat', 'a dog']",
            )
            value = tuple(_fit(f"{prefix}{key}", get_args(kind)[0], x) for x in value)
        elif kind is not Any:  # the model's config is built already
            value = _fit(f"{prefix}{key}", kind, value)
        made[key] = value
    return cls(**made)


def _fit(key: str, kind: type, value: Any) -> Any:
    """A value as this type: an integer is also a float, and a number of numpy is one of Python."""
    number = not isinstance(value, bool)  # which Python takes for an integer
    if number and kind is float and isinstance(value, numbers.Real):
        value = float(value)
        require(math.isfinite(value), f"config key {key}={value} is not a finite number")
    elif number and kind is int and isinstance(value, numbers.Real) and math.isfinite(value):
        whole = math.floor(value)
        value = whole if whole == value else value  # 1e3 is 1000
    large = number and kind is int and isinstance(value, int) and abs(value) >= 2**63
    require(not large, f"config key {key}={str(value)[:20]}… has more than 63 bits")
    fits = isinstance(value, kind) and (number or kind is bool)
    require(fits, f"config key {key}={value!r} is not of type {kind.__name__}")
    return value
