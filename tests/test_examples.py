"""Every notebook runs from top to bottom, at small size, without output that it should not have; HTML draws it."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from sa_lens.units import probes

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "scripts").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NO_SCRIPTS_OF_OTHERS = {"require_js_url": "data:,", "mathjax_url": "data:,"}
"""Without these, nbconvert's page fetches RequireJS and MathJax from a server."""
SHOWS_ATTENTION = {"01_two_streams", "05_views"}


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
    # progress bars and warnings would stand in red
    assert not [output.text for output in shown if output.get("name") == "stderr"]
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds or any("plotly" in str(output) for output in shown)
    if path.stem in SHOWS_ATTENTION:
        assert any("attentionHeads" in str(output) for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for folder in (Path(__file__).parents[1], Path.home(), Path(tempfile.gettempdir())):
        assert f"{folder}/" not in text


DRAWN = {"01_two_streams": 4, "05_views": 9}
"""Pictures of a notebook that a script draws, at least; pictures that are plain HTML need none."""
CUT = """() => [...document.querySelectorAll('.jp-OutputArea-output')].flatMap((output) => {
    const right = output.getBoundingClientRect().left + output.clientWidth + 1;
    const beyond = (element) => element.getBoundingClientRect().right > right;
    const wide = [...output.querySelectorAll('table, svg, p, section, .sa-lens, .sa-lens-box')].filter(beyond);
    if (output.scrollWidth > output.clientWidth + 1) wide.push(output);
    return wide.slice(0, 1).map((element) => `${element.tagName} ${element.className.baseVal ?? element.className}: `
        + `${element.getBoundingClientRect().right} > ${right}, ${element.textContent.slice(0, 80)}`);
})"""
"""The first thing of each output that is beyond its right edge, so that the output has to scroll."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_html(path, browser, executed, tmp_path):
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter(**NO_SCRIPTS_OF_OTHERS).from_notebook_node(executed(path))
    page = tmp_path / f"{path.stem}.html"
    page.write_text(text, encoding="utf-8")
    opened = browser.open(page, viewport={"width": 1280, "height": 900})
    if path.stem in SHOWS_ATTENTION:
        for library in ("plotly", "sa_lens"):
            assert opened.page.locator(f"script[data-sa-lens-library={library}]").count() == 1
    opened.page.wait_for_function("document.querySelectorAll('.sa-lens-view:not([data-drawn])').length === 0")
    assert opened.page.locator(".sa-lens-view[data-drawn]").count() >= DRAWN.get(path.stem, 1)
    for plot in opened.page.locator(".sa-lens-view[data-library=plotly]").all():
        plot.locator(".main-svg").first.wait_for(state="attached")
    for other in opened.page.locator(".sa-lens-view:not([data-library=plotly])").all():
        other.locator("canvas, select, span, svg").first.wait_for(state="attached")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert opened.page.evaluate(CUT) == []
    assert opened.clean()
    opened.page.close()


# ------------------------------------------------------------------------------------------------------------ scripts


@pytest.fixture
def arguments(tmp_path) -> dict[str, list[str]]:
    """For each script, its arguments at small size."""
    from transformers import AutoTokenizer

    from sa_lens.catalogue import run_folder
    from sa_lens.circuits.tasks import ioi

    out = str(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(run_folder("stories-dense"))
    pairs = ioi(tokenizer, 64, words="stories")
    prompts = [
        {"clean": clean, "corrupt": corrupt, "answers": [answer], "wrong_answers": [wrong]}
        for clean, corrupt, answer, wrong in zip(
            pairs.clean_texts,
            pairs.corrupt_texts,
            tokenizer.batch_decode(pairs.answers[:, None]),
            tokenizer.batch_decode(pairs.wrong_answers[:, None]),
            strict=True,
        )
    ]
    task, text = tmp_path / "names.json", tmp_path / "text.txt"
    task.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    text.write_text("\n".join(pairs.clean_texts * 20), encoding="utf-8")
    own = ["--base", "stories-dense", "--text", str(text), "--task", str(task), "--steps", "2", "--pairs", "32"]
    return {
        "two_streams": ["--out", out, "--pairs", "8"],
        "circuits": ["--out", out, "--pairs", "32", "--methods", "eap"],
        "units": ["--out", out, "--tokens", "2000", "--explained", "2", "--probe-tokens", "500"],
        "compare": [*("--out", out, "--steps", "4", "--seeds", "1", "--stories", "300", "--tokens", "512")],
        "views": ["--out", out, "--text", "Lily ran.", "--dark"],
        "your_own_model": [*own, "--out", out],
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_writes_its_figures(path, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, *arguments[path.stem]])
    monkeypatch.setattr(probes, "PROBE_STEPS", 100)
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    written = [Path(line.removeprefix("wrote ")) for line in said.splitlines() if line.startswith("wrote ")]
    assert written
    for file in written:
        assert file.is_relative_to(tmp_path)
        content = file.read_text(encoding="utf-8")
        assert content.count("\n") >= 2 if file.suffix == ".csv" else len(content) > 1000, file


def test_notebooks_and_scripts_are_documented():
    """The table of the documentation has a row for each notebook, with its script."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", (ROOT / "docs" / "examples.md").read_text("utf-8"), re.MULTILINE)
    folder = ROOT / "examples"
    assert {folder / notebook for notebook, _ in rows} == set(NOTEBOOKS)
    assert {folder / script for _, script in rows} == set(SCRIPTS)
