"""Units: figures of all, a closer look at some, both equal to the model's own values."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from sa_lens.report import Report, unit_pages
from sa_lens.report.contents import UnitPage
from sa_lens.report.effort import effort_for
from sa_lens.report.measured_text import encode_for, gather_texts
from sa_lens.report.subjects import Subject
from sa_lens.report.unit_pages import choose_units
from sa_lens.units import Unit, calibrate, explain, label_stories, selectivity, specialization
from sa_lens.views.raster import promoted_tokens

STREAMS = ("clean", "ablated")


@pytest.fixture(scope="module")
def text(gated: Subject, tmp_path_factory: pytest.TempPathFactory):
    return encode_for(gated, gather_texts([gated], None, "text", 1), tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def rules(gated: Subject, text):
    return calibrate(gated.model, text.calibration_blocks, STREAMS, n_tokens=30_000, progress=False)


@pytest.fixture(scope="module")
def table(gated: Subject, text, rules) -> pd.DataFrame:
    return specialization(gated.model, text.held_out_blocks, rules, n_tokens=40_000, progress=False).table


def looked_at(report: Report) -> list[UnitPage]:
    return [unit for unit in report.models[0].units if any(one.histogram is not None for one in unit.streams)]


def test_figures_are_those_of_specialization(report: Report, table: pd.DataFrame) -> None:
    rows = table.set_index(["stream", "layer", "site", "unit"])
    pages = report.models[0].units
    for page in pages:
        for one in page.streams:
            row = rows.loc[(one.stream, page.layer, page.site, page.index)]
            assert one.live == row["live"]
            assert one.firing_rate == pytest.approx(row["firing_rate"], rel=5.1e-3)
            assert (one.mask_on is None) == (one.stream == "clean")
            if one.stream == "ablated":
                assert one.mask_on == pytest.approx(row["mask_rate"], rel=5.1e-3)
            if row["firing_rate"] > 0:
                assert one.effective_tokens == pytest.approx(row["effective_tokens"], rel=5.1e-3)
            else:
                assert one.effective_tokens is None
    live = table[table["live"]]
    wanted = set(zip(live["layer"], live["site"], live["unit"], strict=True))
    assert wanted <= {(page.layer, page.site, page.index) for page in pages}
    assert f"{len(pages):,} of 160 units" in report.models[0].units_note


def test_labels_are_those_of_selectivity(report: Report, gated: Subject, rules) -> None:
    stories = label_stories(gated.tokenizer, 600, 48, seed=1)
    true = selectivity(gated.model, stories, rules, sample_tokens=2, progress=False).table
    rows = true.set_index(["stream", "layer", "site", "unit"])
    found = 0
    for page in report.models[0].units:
        for one in page.streams:
            row = rows.loc[(one.stream, page.layer, page.site, page.index)]
            if one.label:
                found += 1
                assert one.label == row["f1_label"]
                assert one.label_f1 == pytest.approx(row["f1"], rel=5.1e-3)
            else:
                assert not one.live
                assert one.label_f1 is None
    assert found > 50


def test_promoted_tokens(report: Report, gated: Subject) -> None:
    for page in report.models[0].units[::20]:
        (true,) = promoted_tokens(gated.model, [Unit(page.layer, page.site, page.index)], 5)
        assert page.promotes == true


def test_closer_looks_are_spread_evenly_over_layers_and_kinds(report: Report) -> None:
    pages = looked_at(report)
    assert len(pages) == 6
    sites = [(page.layer, page.site) for page in pages]
    counts = [sites.count(site) for site in ((0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp"))]
    assert sorted(counts) == [1, 1, 2, 2]


def test_snippets_hold_the_values_of_the_unit(report: Report, gated: Subject, text) -> None:
    kinds = set()
    blocks = text.held_out_blocks.rows(0, len(text.held_out_blocks))
    spelled = ["".join(gated.tokenizer.decode([int(i)]) for i in row) for row in blocks]
    for page in looked_at(report):
        for one in page.streams:
            if not one.snippets:
                assert not one.live
                continue
            assert [snippet.kind for snippet in one.snippets] == ["top"] * 5 + ["sample"] * 3
            kinds.add(page.site)
            for snippet in one.snippets:
                assert len(snippet.tokens) == len(snippet.values) == 24
                sizes = [abs(value) if page.site == "attn" else value for value in snippet.values]
                assert sizes[snippet.focus] == max(sizes)
            first = one.snippets[0]
            row = next(i for i, whole in enumerate(spelled) if "".join(first.tokens) in whole)
            name = f"blocks.{page.layer}.{'attn.hook_z' if page.site == 'attn' else 'mlp.hook_post'}"
            with torch.no_grad():
                if one.stream == "ablated":
                    with gated.model.ablated():
                        _, cache = gated.model.run_with_cache(blocks[row : row + 1])
                else:
                    _, cache = gated.model.run_with_cache(blocks[row : row + 1])
            values = cache[name][0].flatten(1)[:, page.index]
            whole = values.tolist()
            windows = [whole[i : i + 24] for i in range(len(whole) - 23)]
            assert any(list(first.values) == pytest.approx(window, rel=1e-4, abs=1e-5) for window in windows)
    assert kinds == {"attn", "mlp"}


def test_histograms_count_every_token_or_those_that_it_stays_at(report: Report, table: pd.DataFrame, text) -> None:
    rows = table.set_index(["stream", "layer", "site", "unit"])
    n = min(text.held_out_blocks.n_tokens, 20_000 // 48 * 48)
    for page in looked_at(report):
        for one in page.streams:
            if one.histogram is None:
                continue
            (series,) = one.histogram.series
            if one.stream == "clean":
                assert sum(series.counts) == n
            elif n == table.attrs["n_tokens"]:
                rate = rows.loc[("ablated", page.layer, page.site, page.index)]["mask_rate"]
                assert sum(series.counts) == pytest.approx(rate * n)


def test_explanations_are_those_of_explain(report: Report, gated: Subject, text, rules) -> None:
    page = next(page for page in looked_at(report) if page.streams[0].live)
    unit = Unit(page.layer, page.site, page.index)
    true = explain(
        *(gated.model, text.held_out_blocks, rules["clean"], [unit]),
        n_tokens=30_000,
        snippets=10,
        substitutes=2,
        progress=False,
    ).table.iloc[0]
    assert page.streams[0].explanation == (true["pattern"] if true["explained"] else "")
    assert page.streams[0].explanation_f1 == pytest.approx(true["text_f1"], rel=5.1e-3)


def units_table(rows: list[tuple[int, str, int, bool, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["layer", "site", "unit", "live", "firing_rate", "effective_tokens"])
    table.insert(0, "stream", "clean")
    table.attrs["effective_tokens_of_text"] = 64.0
    return table


def test_the_most_telling_units_come_first() -> None:
    table = units_table(
        [
            (0, "attn", 0, True, 0.5, 64.0),  # fires on everything alike: 0.5 * log2(64 / 64) = 0
            (0, "attn", 1, True, 0.1, 2.0),  # 0.1 * log2(64 / 2) = 0.5
            (0, "attn", 2, True, 0.3, 16.0),  # 0.3 * log2(64 / 16) = 0.6
            (0, "attn", 3, False, 0.9, 1.0),  # dead
            (0, "attn", 4, True, 0.0, float("nan")),  # never fires
            (0, "mlp", 7, True, 0.1, 2.0),
            (0, "mlp", 5, True, 0.1, 2.0),  # as telling as neuron 7: the lower one first
        ]
    )
    expected = {
        0: [],
        1: ["L0.attn.2"],
        2: ["L0.attn.2", "L0.mlp.5"],
        4: ["L0.attn.1", "L0.attn.2", "L0.mlp.5", "L0.mlp.7"],
        99: ["L0.attn.0", "L0.attn.1", "L0.attn.2", "L0.mlp.5", "L0.mlp.7"],
    }
    for n_units, names in expected.items():
        assert [str(unit) for unit in choose_units(table, n_units)] == names


def test_fewer_units_than_sublayers_are_spread_over_the_layers() -> None:
    table = units_table(
        [
            (layer, site, unit, True, 0.1, 2.0 + unit)
            for layer in range(3)
            for site in ("attn", "mlp")
            for unit in (0, 1)
        ]
    )
    for n_units, names in {
        2: ["L0.attn.0", "L1.mlp.0"],
        3: ["L0.attn.0", "L1.attn.0", "L2.attn.0"],
        4: ["L0.attn.0", "L0.mlp.0", "L1.mlp.0", "L2.attn.0"],
        8: [f"L{layer}.{site}.0" for layer in range(3) for site in ("attn", "mlp")] + ["L0.attn.1", "L1.mlp.1"],
    }.items():
        assert [str(unit) for unit in choose_units(table, n_units)] == sorted(names)


def test_of_very_many_units_the_most_telling_are_listed(
    gated: Subject, text, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_pages, "MOST_LISTED", 10)
    monkeypatch.setattr(unit_pages, "LABELLED", 60)
    mentioned = {"L0.mlp.1", "L1.attn.0"}
    pages, note, _ = unit_pages.unit_pages(gated, text, effort_for([gated], n_units=0), mentioned, 0, lambda _: None)
    all_of_them = {page.name: page for page in report.models[0].units}
    assert mentioned <= {page.name for page in pages}
    assert 10 <= len(pages) <= 12
    assert f"{len(pages)} of " in note
    assert "10 of the " in note
    telling = [page for page in pages if page.name not in mentioned]
    assert {(page.layer, page.site) for page in telling} == {
        (layer, site) for layer in (0, 1) for site in ("attn", "mlp")
    }
    for page in telling:
        assert page.promotes == all_of_them[page.name].promotes


def test_units_that_stories_mention_are_listed_dead_or_not(report: Report) -> None:
    mentioned = {unit.name for story in report.models[0].stories if story.gates for unit in story.gates.units}
    for page in report.models[0].units:
        assert page.name in mentioned or any(one.live for one in page.streams)
