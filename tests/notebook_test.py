"""launch/colab_digits.ipynb runs from the first cell to the last, here on the CPU."""

import re

import nbclient
import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "launch" / "colab_digits.ipynb"


def fill_in(notebook, **values):
    """Sets form fields: lines `NAME = value  #@param ...`."""
    for cell in notebook.cells:
        for name, value in values.items():
            cell.source, count = re.subn(
                rf"^{name} = .*?  #@param", f"{name} = {value!r}  #@param", cell.source, flags=re.M
            )
            values = values if not count else {k: v for k, v in values.items() if k != name}
    assert not values, f"no such field: {list(values)}"


def printed(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs)


@pytest.mark.slow
def test_the_notebook_trains_draws_says_and_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOFORMER_SKIP_INSTALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    fill_in(notebook, SIZE="tiny", STEPS=4, WORKDIR=str(tmp_path))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    ).execute()  # raises where a cell does
    install, train, draw, _ = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "There is no TPU or GPU here" in printed(install)
    assert "step" in printed(train) and (tmp_path / "metrics.jsonl").is_file()
    assert (tmp_path / "checkpoints" / "4").is_dir()
    assert "draw a seven" in printed(draw) and "two plus three is" in printed(draw)
