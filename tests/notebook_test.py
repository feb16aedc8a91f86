"""launch/colab_digits.ipynb runs from the first cell to the last, here on the CPU."""

import re

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "launch" / "colab_digits.ipynb"


def fill_in(notebook, **values):
    """Sets form fields: lines `NAME = value  # @param ...`, each exactly once."""
    for name, value in values.items():
        count = 0
        for cell in notebook.cells:
            line = rf"^{name} = .*?  # @param"
            cell.source, here = re.subn(
                line, f"{name} = {value!r}  # @param", cell.source, flags=re.M
            )
            count += here
        assert count == 1, f"{count} fields {name}"


def printed(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs)


@pytest.mark.slow
def test_the_notebook_trains_draws_says_and_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOFORMER_SKIP_INSTALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    picture = tmp_path / "picture.png"  # 20 steps teach nobody to paint
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(picture)
    fill_in(notebook, SIZE="tiny", STEPS=20, WORKDIR=str(tmp_path), PICTURE=str(picture))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    ).execute()  # raises where a cell does
    install, train, draw, read = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "No TPU or GPU here" in printed(install)
    assert "step" in printed(train) and (tmp_path / "metrics.jsonl").is_file()
    assert (tmp_path / "checkpoints" / "20").is_dir()
    assert "draw a seven" in printed(draw) and "two plus three is" in printed(draw)
    assert "read this: " in printed(read)
