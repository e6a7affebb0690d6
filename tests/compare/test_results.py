"""Tables of made-up figures: means, paired differences, corrected verdicts, and how they are written."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sa_lens.compare.columns import COLUMNS, OTHER, PAPER, WHOLE, Column, family, paper_value
from sa_lens.compare.figure import small_multiples
from sa_lens.compare.report import (
    THE_PAPERS,
    difference_tables,
    latex,
    markdown,
    tables,
    verdict_table,
    verdict_text,
    write,
)
from sa_lens.compare.results import Comparison
from sa_lens.views import draw

BASE = [80.0, 82.0, 78.0, 81.0]
LOCAL = [40.0, 43.0, 38.0, 40.0]
"""ACDC edges: differences -40, -39, -40, -41."""


def comparison(**more: dict[tuple[str, str], list[float]]) -> Comparison:
    """Four seeds; by variant, (column, stream): a value a seed."""
    figures = {
        "baseline": {("acdc_edges_0.01", "clean"): BASE, ("mean_abs_weight", WHOLE): [0.1, 0.1, 0.1, 0.1]},
        "local-8": {
            ("acdc_edges_0.01", "clean"): LOCAL,
            ("acdc_edges_0.01", "ablated"): [30.0, 120.0, math.nan, 60.0],
            ("mean_abs_weight", WHOLE): [0.1, 0.11, 0.09, 0.1],
        },
        **more,
    }
    rows = [
        {"variant": variant, "seed": seed, "column": column, "stream": stream, "value": value}
        for variant, columns in figures.items()
        for (column, stream), values in columns.items()
        for seed, value in enumerate(values)
    ]
    notes = pd.DataFrame([{"variant": "local-8", "seed": 2, "group": "acdc", "note": "too weak"}])
    return Comparison("made-up", tuple(figures), (0, 1, 2, 3), pd.DataFrame(rows), notes, 0)


def row(found: pd.DataFrame, variant: str, column: str, stream: str) -> dict:
    (only,) = found[(found["variant"] == variant) & (found["column"] == column) & (found["stream"] == stream)].to_dict(
        "records"
    )
    return only


def test_means_and_differences_are_over_seeds():
    found = row(comparison().summary(), "local-8", "acdc_edges_0.01", "clean")
    assert (found["n"], found["mean"], found["n_pairs"]) == (4, np.mean(LOCAL), 4)
    assert found["difference"] == -40
    twin = stats.ttest_rel(LOCAL, BASE)
    assert found["p"] == pytest.approx(twin.pvalue)
    low, high = twin.confidence_interval(0.95)
    assert (found["difference_low"], found["difference_high"]) == (pytest.approx(low), pytest.approx(high))


def test_the_ablated_stream_is_compared_with_the_only_stream_of_the_baseline():
    found = row(comparison().summary(), "local-8", "acdc_edges_0.01", "ablated")
    assert (found["n"], found["n_pairs"]) == (3, 3)
    assert found["difference"] == pytest.approx(np.mean([30 - 80, 120 - 82, 60 - 81]))
    assert found["verdict"] == "undecided"


def test_verdicts_are_corrected_over_the_whole_family():
    """Two of the claims on the clean stream are measured; the correction is that of all of them."""
    summary = comparison().summary()
    edges, weight = (
        row(summary, "local-8", name, stream)
        for name, stream in (("acdc_edges_0.01", "clean"), ("mean_abs_weight", ""))
    )
    n = len(family("clean"))
    assert n > 2
    assert edges["p_holm"] == pytest.approx(n * edges["p"])
    assert weight["p_holm"] == pytest.approx(min(1.0, (n - 1) * weight["p"]))
    assert (edges["verdict"], weight["verdict"]) == ("holds", "undecided")


def test_a_claim_can_fail():
    worse = {("acdc_edges_0.01", "clean"): [120.0, 123.0, 119.0, 120.0]}
    assert row(comparison(worse=worse).summary(), "worse", "acdc_edges_0.01", "clean")["verdict"] == "fails"


def test_no_verdict_without_a_claim_or_on_the_baseline():
    loss = {("loss", "clean"): [1.0, 1.1, 1.2, 1.3]}
    summary = comparison(other=loss).summary()
    assert row(summary, "other", "loss", "clean")["verdict"] == ""
    assert set(summary[summary["variant"] == "baseline"]["verdict"]) == {""}


def test_differences_from_another_variant_are_of_like_streams():
    control = {("acdc_edges_0.01", "clean"): [41.0] * 4, ("acdc_edges_0.01", "ablated"): [10.0] * 4}
    summary = comparison(control=control).summary("control")
    assert row(summary, "local-8", "acdc_edges_0.01", "ablated")["difference"] == pytest.approx(60)
    with pytest.raises(ValueError, match="against='nobody'"):
        comparison().summary("nobody")


def test_one_seed_gives_no_verdict():
    one = comparison()
    one = Comparison(one.name, one.variants, (0,), one.values[one.values["seed"] == 0], one.notes, 0)
    found = row(one.summary(), "local-8", "acdc_edges_0.01", "clean")
    assert found["verdict"] == "undecided"
    assert math.isnan(found["low"])
    assert "40" in tables(one)["Circuits by ACDC"].to_string()


def test_the_first_table_shows_ours_and_the_papers_figures():
    title, shown = next(iter(tables(comparison()).items()))
    assert title == THE_PAPERS
    shown = shown.set_index(["variant", "stream"])
    edges, weight = COLUMNS["acdc_edges_0.01"].label, COLUMNS["mean_abs_weight"].label
    half = np.diff(stats.ttest_1samp(LOCAL, 0).confidence_interval(0.95))[0] / 2
    assert shown.loc[("local-8", "clean"), edges] == f"40 ± {half:.0f}"
    assert shown.loc[("local-8", "ablated"), edges].endswith("(n=3)")
    assert shown.loc[("local-8", "clean"), weight].startswith("0.100 ±")
    assert shown.loc[("local-8", "ablated"), weight] == "", "weights stand with the clean stream"
    assert ("baseline", "ablated") not in shown.index
    assert shown.loc[("baseline", "paper, clean"), edges] == "79"
    assert shown.loc[("local-8", "paper, clean"), edges] == "36"


def test_a_theme_is_a_table():
    shown = tables(comparison())
    assert list(shown) == [THE_PAPERS, "Weights", "Circuits by ACDC"]
    assert set(shown["Weights"]["stream"]) == {"weights"}


def test_missing_values_are_shown_as_such():
    nothing = {("cpr", "clean"): [math.nan] * 4}
    made = comparison(weak=nothing)
    assert tables(made)["Faithfulness"].to_dict("records") == [{"variant": "weak", "stream": "clean", "CPR": "n/a"}]
    assert difference_tables(made)["Faithfulness"]["CPR"].item() == "n/a"
    assert verdict_table(made).set_index("column").loc["CPR: higher", "weak"] == "n/a"


def test_verdicts_are_shown_with_their_differences():
    shown = verdict_table(comparison()).set_index(["column", "stream"])["local-8"]
    label = COLUMNS["acdc_edges_0.01"].label
    assert shown.to_dict() == {
        ("mean absolute weight, all parameters: higher", "weights"): "undecided",
        (f"{label}: lower", "clean"): "holds",
        (f"{label}: lower", "ablated"): "undecided",
    }
    cells = difference_tables(comparison())["Circuits by ACDC"].set_index("stream")[label]
    assert cells["clean"].startswith("-40 [-4")
    assert cells["clean"].endswith(": holds")
    assert "(n=3)" in cells["ablated"], "one seed has no value"


def test_verdicts_in_short_name_the_variants_of_each():
    worse = {("acdc_edges_0.01", "clean"): [120.0, 123.0, 119.0, 120.0]}
    text = verdict_text(comparison(worse=worse))
    assert "circuits are smaller\n" in text
    assert "holds: local-8; fails: worse" in text


def test_an_own_column_is_shown_without_a_claim():
    made = comparison(own={("my_column", "clean"): [1.0, 2.0, 3.0, 4.0]})
    assert row(made.summary(), "own", "my_column", "clean")["verdict"] == ""
    assert list(tables(made))[-1] == OTHER
    assert "my_column" in markdown(made)
    assert [panel.title for panel in small_multiples(made).panels][-1] == "my_column"


def test_an_own_claim_joins_its_family(monkeypatch):
    n = len(family("clean"))
    monkeypatch.setitem(COLUMNS, "my_column", Column("my_column", "mine", 2, +1, "it grows", streams=("clean",)))
    assert (len(family("clean")), family("ablated")) == (n + 1, family("ablated"))
    summary = comparison(
        own={("my_column", "clean"): [1.0, 2.0, 3.0, 4.0], ("acdc_edges_0.01", "clean"): LOCAL}
    ).summary()
    edges = row(summary, "own", "acdc_edges_0.01", "clean")
    assert edges["p_holm"] == pytest.approx((n + 1) * edges["p"])
    assert row(summary, "own", "my_column", "clean")["verdict"] == "undecided", "the baseline has no value"


def test_files_are_whole(tmp_path):
    made = comparison()
    written = write(made, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "summary.csv", keep_default_na=True).drop(columns=["stream", "verdict", "claim"]),
        made.summary().drop(columns=["stream", "verdict", "claim"]),
    )
    text = (tmp_path / "table.md").read_text()
    assert text == markdown(made)
    assert "too weak" in text
    assert "excludes 0" in text
    tex = (tmp_path / "table.tex").read_text()
    assert tex == latex(made)
    assert r"$\pm$" in tex
    made_of = len(tables(made)) + len(difference_tables(made)) + verdict_table(made)["claim"].nunique()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{table}") == made_of
    assert json.loads((tmp_path / "figure.json").read_text())["variants"] == ["baseline", "local-8"]
    assert "plotly" in (tmp_path / "figure.html").read_text()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_the_latex_compiles(tmp_path):
    text = latex(comparison())
    page = rf"\documentclass{{article}}\usepackage{{booktabs,array}}\begin{{document}}{text}\end{{document}}"
    (tmp_path / "page.tex").write_text(page)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 0


def test_an_unfinished_comparison_says_so():
    made = comparison()
    partial = Comparison(made.name, made.variants, made.seeds, made.values, made.notes, 7)
    assert "Unfinished: 7" in markdown(partial)
    assert "Unfinished" not in markdown(made)


def test_the_figure_has_a_panel_a_column_and_a_dot_a_variant():
    record = small_multiples(comparison())
    assert [panel.title for panel in record.panels] == [
        COLUMNS[name].label for name in ("mean_abs_weight", "acdc_edges_0.01")
    ]
    edges = record.panels[1]
    assert edges.reference == np.mean(BASE)
    clean, ablated = edges.dots
    assert clean.mean == (np.mean(BASE), np.mean(LOCAL))
    assert ablated.mean == (None, 70.0)
    figure = draw(record)
    assert [list(trace.x) for trace in figure.data if trace.name == "ablated stream"] == [[None, 70.0]]
    lines = [shape.x0 for shape in figure.layout.shapes]
    assert lines == [panel.reference for panel in record.panels]
    with pytest.raises(ValueError, match="no values of cpr"):
        small_multiples(comparison(), ("cpr",))


def test_every_claim_has_a_direction_and_words():
    for column in COLUMNS.values():
        assert column.direction in (-1, 0, 1)
        assert bool(column.claim) == bool(column.direction)
    assert len(set(family("clean"))) == len(family("clean"))
    assert {"mean_abs_weight"} <= {*family("clean")} - {*family("ablated")}


def test_the_papers_figures_are_those_of_the_published_table():
    assert paper_value("baseline", "perplexity") == 5.73
    assert paper_value("local-2", "acdc_edges_0.01") == 54
    assert paper_value("local-2", "cpr") is None
    assert paper_value("random-init", "perplexity") is None
    assert len(PAPER) == 9
    assert all(len(figures) == 5 for figures in PAPER.values())


def test_a_mean_far_off_is_an_arrow_at_the_edge_and_all_others_are_where_they_are():
    near = {f"global-{k}": {("loss", "clean"): [1.0 + k / 100] * 4} for k in (1, 2, 4, 8)}
    made = comparison(**near, **{"random-init": {("loss", "clean"): [7.2] * 4}})
    figure = draw(small_multiples(made, ("loss",)))
    dots, arrow = figure.data
    low, high = figure.layout.xaxis.range
    assert dots.x[made.variants.index("global-4")] == 1.04
    assert dots.x[made.variants.index("random-init")] is None
    assert low < 1.01
    assert 1.08 < arrow.x[0] < high < 2
    assert (arrow.marker.symbol, *arrow.text) == ("triangle-right", "7.2")
    assert "random-init, clean" in arrow.hovertemplate
