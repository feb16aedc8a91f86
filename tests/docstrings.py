"""Rewrites the reports of `plan` in the docstrings of configs/ and in docs/planning.md.

    python tests/docstrings.py            all of them: an hour on two cores; run it before a release
    python tests/docstrings.py imagenet256 docs/planning.md

A docstring names its command in backticks; the indented block after it is the report. In a page the
report is the block without a language after the command's line. The records are those of stand_in.py.
"""

import contextlib
import functools
import re
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from stand_in import SOURCES, write_stand_in

from monoformer_jax.cli import load_config
from monoformer_jax.plan import describe
from monoformer_jax.planning.estimate import estimate

ROOT = Path(__file__).parent.parent
COMMAND = r"python -m monoformer_jax\.plan --config=(\S+?)\s+--topology=([^\s`]+)"
# Command, the rest of its paragraph, and the report.
DOCSTRING = re.compile(rf"`{COMMAND}`((?:.+\n)+\n)((?:(?: {{4}}.*)?\n)*(?: {{4}}.*\n))")
PAGE = re.compile(rf"`{COMMAND}`((?:.+\n)+\n```\n)((?:.+\n)+)```\n")


def files() -> list[Path]:
    """Files with a report."""
    pages = [*sorted((ROOT / "configs").glob("*.py")), ROOT / "docs" / "planning.md"]
    return [path for path in pages if find(path)]


def find(path: Path) -> re.Match | None:
    """Groups: config, topology, text before the report, report."""
    return (PAGE if path.suffix == ".md" else DOCSTRING).search(path.read_text(encoding="utf-8"))


@functools.cache
def report(config: str, topology: str) -> list[str]:
    """Lines that `plan` prints for this config with the stand-in records."""
    known = [name for name in load_config(config, []).data.records if name in SOURCES]
    with tempfile.TemporaryDirectory() as folder:
        found = estimate(load_config(config, write_stand_in(Path(folder), known)), topology)
    lines = describe(found, topology, "train")
    return [line for line in lines if not line.startswith("compiled in ")]  # it differs every time


def layout(lines: list[str], path: Path) -> str:
    """The report as it stands in the file."""
    if path.suffix == ".md":
        return "".join(f"{line}\n" for line in lines)
    wrapped = [textwrap.wrap(line, 100, subsequent_indent=" " * 8) for line in lines]
    return "".join(f"    {line}\n" for some in wrapped for line in some)


def rewrite(path: Path) -> None:
    with contextlib.chdir(ROOT):
        lines = report(*find(path).groups()[:2])
    text, found = path.read_text(encoding="utf-8"), find(path)
    made = text[: found.start(4)] + layout(lines, path) + text[found.end(4) :]
    path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    for path in files():
        if not sys.argv[1:] or path.stem in sys.argv[1:] or str(path.relative_to(ROOT)) in sys.argv:
            rewrite(path)
            print(path.relative_to(ROOT), flush=True)
