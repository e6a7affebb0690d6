"""Tables of made-up figures: means, paired differences, corrected verdicts, and how they are written."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sa_lens.compare import (
    COLUMNS,
    MATCHED,
    Column,
    Comparison,
    difference_tables,
    tables,
    verdict_table,
    verdict_text,
    write,
)
from sa_lens.compare.columns import OTHER, PAPER, WEIGHTS, claims_of, column_named, published_value
from sa_lens.compare.markdown_latex import PAPER_TABLE, latex, markdown
from sa_lens.views import draw

BASE = [80.0, 82.0, 78.0, 81.0]
LOCAL = [40.0, 43.0, 38.0, 40.0]
"""ACDC edges: differences -40, -39, -40, -41."""


def task_of(column: str) -> str:
    return column_named(column).tasks[0]


def comparison(**more: dict[tuple[str, str], list[float]]) -> Comparison:
    """Four seeds; by variant, (column, stream): one value per seed. Columns about a task are of IOI."""
    figures = {
        "baseline": {("acdc_edges_0.01", "clean"): BASE, ("mean_abs_weight", WEIGHTS): [0.1, 0.1, 0.1, 0.1]},
        "local-8": {
            ("acdc_edges_0.01", "clean"): LOCAL,
            ("acdc_edges_0.01", "ablated"): [30.0, 120.0, math.nan, 60.0],
            ("mean_abs_weight", WEIGHTS): [0.1, 0.11, 0.09, 0.1],
        },
        **more,
    }
    rows = [
        {"variant": variant, "seed": seed, "task": task_of(column), "column": column, "stream": stream, "value": value}
        for variant, columns in figures.items()
        for (column, stream), values in columns.items()
        for seed, value in enumerate(values)
    ]
    notes = pd.DataFrame([{"variant": "local-8", "seed": 2, "measurement": "acdc", "note": "too weak"}])
    return Comparison("made-up", tuple(figures), (0, 1, 2, 3), pd.DataFrame(rows), notes, 0)


def row(summary: pd.DataFrame, variant: str, column: str, stream: str) -> dict:
    place = [variant, task_of(column), column, stream]
    chosen = (summary[["variant", "task", "column", "stream"]] == place).all(axis=1)
    (only,) = summary[chosen].to_dict("records")
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


def test_verdicts_are_corrected_over_the_whole_claims_of():
    """Two of the claims on the clean stream are measured; the correction is that of all of them."""
    summary = comparison().summary()
    edges, weight = (
        row(summary, "local-8", name, stream)
        for name, stream in (("acdc_edges_0.01", "clean"), ("mean_abs_weight", ""))
    )
    n = len(claims_of("clean"))
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


def test_at_matched_loss_each_seed_and_stream_is_compared_with_its_nearest_dense_model():
    """Losses of the dense models are 1.0 and 1.5 in every seed; the clean stream is near the first, the ablated stream
    near the second in two seeds; weights go with the clean stream."""
    edges = "acdc_edges_0.01"
    short = {("loss", "clean"): [1.5] * 4, (edges, "clean"): [20.0, 21.0, 22.0, 23.0], ("hoyer", ""): [0.9] * 4}
    gated = {
        **{
            ("loss", "clean"): [1.1] * 4,
            ("loss", "ablated"): [1.4, 1.6, 1.2, 1.1],
            ("hoyer", ""): [0.3, 0.4, 0.5, 0.6],
        },
        **{(edges, "clean"): [50.0] * 4, (edges, "ablated"): [10.0, 10.0, 10.0, math.nan]},
    }
    made = comparison(**{"dense-9": short, "gated": gated})
    base = made.values["variant"] == "baseline"
    more = made.values[base].assign(task="", column="loss", value=1.0, stream="clean").drop_duplicates("seed")
    hoyer = more.assign(column="hoyer", stream="", value=0.1)
    made = dataclasses.replace(made, values=pd.concat([made.values, more, hoyer]), dense=("baseline", "dense-9"))
    summary = made.summary(MATCHED)
    assert set(summary["variant"]) == {"local-8", "gated"}, "dense models are the reference"
    differences = {
        (column, stream): [row(summary, "gated", column, stream)[name] for name in ("n_pairs", "difference")]
        for column, stream in ((edges, "clean"), (edges, "ablated"), ("hoyer", ""), ("loss", "ablated"))
    }
    assert differences[edges, "clean"] == [4, pytest.approx(50 - np.mean(BASE))]
    assert differences[edges, "ablated"] == [3, pytest.approx(np.mean([10 - 20, 10 - 21, 10 - BASE[2]]))]
    assert differences["hoyer", ""] == [4, pytest.approx(0.35)]
    assert differences["loss", "ablated"] == [4, pytest.approx(np.mean([-0.1, 0.1, 0.2, 0.1]))]
    assert [*verdict_table(made, MATCHED).columns[4:]] == ["local-8", "gated"]
    assert math.isnan(row(summary, "local-8", edges, "clean")["difference"]), "it has no loss"


def test_one_seed_gives_no_verdict():
    one = comparison()
    one = Comparison(one.name, one.variants, (0,), one.values[one.values["seed"] == 0], one.notes, 0)
    found = row(one.summary(), "local-8", "acdc_edges_0.01", "clean")
    assert found["verdict"] == "undecided"
    assert math.isnan(found["low"])
    assert "40" in tables(one)["Circuits by ACDC: IOI"].to_string()


def test_the_first_table_shows_ours_and_the_papers_figures():
    title, shown = next(iter(tables(comparison()).items()))
    assert title == PAPER_TABLE
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
    assert list(shown) == [PAPER_TABLE, "Weights", "Circuits by ACDC: IOI"]
    assert set(shown["Weights"]["stream"]) == {"weights"}


def test_missing_values_are_shown_as_such():
    nothing = {("cpr", "clean"): [math.nan] * 4}
    made = comparison(weak=nothing)
    assert tables(made)["Faithfulness: IOI"].to_dict("records") == [
        {"variant": "weak", "stream": "clean", "CPR": "n/a"}
    ]
    assert difference_tables(made)["Faithfulness: IOI"]["CPR"].item() == "n/a"
    assert verdict_table(made).set_index("column").loc["CPR: higher", "weak"] == "n/a"


def test_verdicts_are_shown_with_their_differences():
    shown = verdict_table(comparison()).set_index(["task", "column", "stream"])["local-8"]
    label = COLUMNS["acdc_edges_0.01"].label
    assert shown.to_dict() == {
        ("", "mean absolute weight, all parameters: higher", "weights"): "undecided",
        ("IOI", f"{label}: lower", "clean"): "holds",
        ("IOI", f"{label}: lower", "ablated"): "undecided",
    }
    cells = difference_tables(comparison())["Circuits by ACDC: IOI"].set_index("stream")[label]
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
    assert titles(made)[-1] == "my_column"


def test_an_own_claim_joins_its_claims_of(monkeypatch):
    n = len(claims_of("clean"))
    monkeypatch.setitem(COLUMNS, "my_column", Column("my_column", "mine", 2, +1, "it grows", streams=("clean",)))
    assert (len(claims_of("clean")), claims_of("ablated")) == (n + 1, claims_of("ablated"))
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
        pd.read_csv(tmp_path / "summary.csv", keep_default_na=True).drop(
            columns=["task", "stream", "verdict", "claim"]
        ),
        made.summary().drop(columns=["task", "stream", "verdict", "claim"]),
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


def test_a_task_is_a_column_of_the_table():
    """The same column in another task has its own rows, its own table and its own claim in the family."""
    made = comparison()
    other = made.values[made.values["column"] == "acdc_edges_0.01"].assign(task="object")
    made = dataclasses.replace(made, values=pd.concat([made.values, other]))
    summary = made.summary()
    rows = summary[(summary["column"] == "acdc_edges_0.01") & (summary["stream"] == "clean")].set_index("variant")
    assert rows.loc["local-8", "task"].tolist() == ["ioi", "object"]
    assert rows.loc["local-8", "difference"].tolist() == [-40, -40]
    shown = tables(made)
    assert list(shown) == [PAPER_TABLE, "Weights", "Circuits by ACDC: IOI", "Circuits by ACDC: object recall"]
    assert len(shown[PAPER_TABLE].columns) == 4
    verdicts = verdict_table(made)
    assert verdicts[verdicts["stream"] == "clean"]["task"].tolist() == ["IOI", "object recall"]
    assert "object recall, edges kept by ACDC" in verdict_text(made)


def test_an_unfinished_comparison_says_so():
    made = comparison()
    partial = Comparison(made.name, made.variants, made.seeds, made.values, made.notes, 7)
    assert "Unfinished: 7" in markdown(partial)
    assert "Unfinished" not in markdown(made)


def titles(made: Comparison) -> list[str]:
    return [note.text.replace("<br>", " ") for note in draw(made).layout.annotations]


def test_the_figure_has_one_panel_per_column_and_one_dot_per_variant():
    made = draw(comparison())
    assert titles(comparison()) == [COLUMNS["mean_abs_weight"].label, f"{COLUMNS['acdc_edges_0.01'].label}: IOI"]
    weights, clean, ablated = made.data
    assert weights.name == "weights"
    assert list(clean.x) == [np.mean(BASE), np.mean(LOCAL)]
    assert (ablated.name, list(ablated.x)) == ("ablated stream", [None, 70.0])
    low, high = stats.ttest_1samp(LOCAL, 0).confidence_interval(0.95)
    assert clean.error_x.array[1] == pytest.approx(high - np.mean(LOCAL))
    assert clean.error_x.arrayminus[1] == pytest.approx(np.mean(LOCAL) - low)
    assert [shape.x0 for shape in made.layout.shapes] == [0.1, np.mean(BASE)]
    with pytest.raises(ValueError, match="no values of cpr"):
        draw(comparison(), columns=("cpr",))


def test_every_claim_has_a_direction_and_words():
    for column in COLUMNS.values():
        assert column.direction in (-1, 0, 1)
        assert bool(column.claim) == bool(column.direction)
    assert len(set(claims_of("clean"))) == len(claims_of("clean"))
    assert {("", "mean_abs_weight")} <= {*claims_of("clean")} - {*claims_of("ablated")}


def test_the_papers_figures_are_those_of_the_published_table():
    assert published_value("baseline", "", "perplexity") == 5.73
    assert published_value("local-2", "ioi", "acdc_edges_0.01") == 54
    assert published_value("local-2", "object", "acdc_edges_0.01") is None
    assert published_value("local-2", "ioi", "cpr") is None
    assert published_value("random-init", "", "perplexity") is None
    assert len(PAPER) == 9
    assert all(len(figures) == 5 for figures in PAPER.values())


def test_a_mean_far_off_is_an_arrow_at_the_edge_and_all_others_are_where_they_are():
    near = {f"global-{k}": {("loss", "clean"): [1.0 + k / 100] * 4} for k in (1, 2, 4, 8)}
    made = comparison(**near, **{"random-init": {("loss", "clean"): [7.2] * 4}})
    drawn = draw(made, columns=("loss",))
    dots, arrow = drawn.data
    low, high = drawn.layout.xaxis.range
    assert dots.x[made.variants.index("global-4")] == 1.04
    assert dots.x[made.variants.index("random-init")] is None
    assert low < 1.01
    assert 1.08 < arrow.x[0] < high < 2
    assert (arrow.marker.symbol, *arrow.text) == ("triangle-right", "7.2")
    assert "random-init, clean" in arrow.hovertemplate
