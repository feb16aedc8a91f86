"""Self-contained HTML pages: pictures and style are inside, nothing is loaded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import PIL.Image
from etils import epath

from monoformer_jax.files import atomic_write

_WRITER = '<meta name="generator" content="monoformer_jax {}">'
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } .scroll { overflow-x: auto; }
td, th { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; display: block; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
.warning { color: #a40000; font-weight: 600; } .note { color: #666; }
"""


def escape(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value))


def image(picture: PIL.Image.Image, side: int = 0, title: str = "") -> str:
    """An <img> with the picture inside.

    Args:
      side: width in CSS pixels; 0: that of the picture.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    width = f' width="{side}"' if side else ""
    named = f'alt="{escape(title)}" title="{escape(title)}"'
    return f'<img src="data:image/png;base64,{data}" {named}{width}>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table; cells are HTML. With `numbers`, all columns but the first are aligned right."""

    def cells(tag, row):
        kinds = [' class="number"' if numbers and i else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>\n{body}</table></div>'


def write_page(path: epath.Path, title: str, body: str, command: str, style: str = "") -> None:
    """Writes a page atomically."""
    with atomic_write(path) as file:
        file.write_text(
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width">\n{_WRITER.format(command)}\n'
            f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style></head>\n"
            f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n",
            encoding="utf-8",
        )


def is_page_of(path: epath.Path, command: str) -> bool:
    """Whether the file is a page that this command wrote."""
    try:
        with path.open("rb") as file:
            return _WRITER.format(command).encode() in file.read(1000)
    except OSError:
        return False
