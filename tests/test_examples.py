"""Every notebook runs from top to bottom, at small size, without output that it should not have."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
SHOWS_CIRCUITSVIS = {"01_train_and_patch", "05_views"}


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, executed):
    notebook = executed(path)
    shown = outputs(notebook)
    assert not [output for output in shown if output.output_type == "error"]
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds or any("plotly" in str(output) for output in shown)
    if path.stem in SHOWS_CIRCUITSVIS:
        assert any("circuitsvis" in str(output) for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for folder in (Path(__file__).parents[1], Path.home(), Path(tempfile.gettempdir())):
        assert f"{folder}/" not in text
