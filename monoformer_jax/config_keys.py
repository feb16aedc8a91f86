"""Lists the configs of this package, or prints every key of one with its value, type and comment.

  python -m monoformer_jax config
  python -m monoformer_jax config digits
  python -m monoformer_jax config configs/finetune.py:runs/imagenet --keys=lora

The config is a name of the package, or a file; every key can be changed in the commands that take
--config, with --config.KEY=VALUE.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from monoformer_jax.cli import load_config, nearest, shipped_configs
from monoformer_jax.errors import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", metavar="NAME|FILE[:ARG]", help="a config; default: list those shipped"
    )
    parser.add_argument(
        "--keys", default="", metavar="PREFIX", help="only keys that begin with it, such as data"
    )


def main(args: argparse.Namespace) -> None:
    if args.config is None:
        for name, file in sorted(shipped_configs().items()):
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            print(f"{name:<22}{doc.partition(chr(10))[0]}")
        return
    config = load_config(args.config, args.overrides)
    default = _default(config)
    keys = [key for key in describe(config) if key.name.startswith(args.keys)]
    names = [key.name for key in describe(config)]
    require(bool(keys), f"--keys={args.keys}: no key begins so{nearest(args.keys, names)}")
    print("key, value, type; * differs from the default")
    for key in keys:
        other = value_at(default, key.name)
        changed = "" if other == key.value else f"   default {other!r}"
        print(f"{'*' if changed else ' '} {key.name} = {key.value!r}   {key.type}{changed}")
        for line in textwrap.wrap(key.comment, 100):
            print(f"      {line}")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config: its dotted name, value, type and the comment in the source."""

    name: str
    value: Any
    type: str
    comment: str


def describe(config: Any, prefix: str = "") -> Iterator[Key]:
    """Yields every key of a config dataclass, those of nested ones included."""
    comments: dict[str, str] = {}
    for cls in reversed(type(config).__mro__[:-1]):
        comments |= _comments(cls)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{prefix}{field.name}.")
        elif prefix + field.name != "model.predict_variance":  # derived, see make_config
            yield Key(prefix + field.name, value, str(field.type), comments.get(field.name, ""))


def value_at(config: Any, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _default(config: Any) -> Any:
    from monoformer_jax.models import make_config

    return make_config({"model": {"kind": config.model.kind}})


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment on the lines of the field, or above it, in the source of a dataclass."""
    source = textwrap.dedent(inspect.getsource(cls))
    words = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            inside = range(first, (node.end_lineno or first) + 1)
            found[node.target.id] = " ".join(words[line] for line in inside if line in words)
    return found
