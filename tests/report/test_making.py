"""A report from run folders, as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from sa_lens.cli import main
from sa_lens.data.tokenizers import PART_OF_CHARACTER
from sa_lens.report import Report, make_report, making, read, save, unit_pages
from sa_lens.report.contents import ModelPage, UnitPage
from sa_lens.report.making import Phases
from sa_lens.report.subjects import Subject

STRANGE = (
    "<script>alert('1')</script> & \"2\" &amp; {3}",
    "Ben saw 😀 and 👩‍👩‍👧 by the lake, \U0001f469\U0001f3fd too.",
    "שלום, said Lily. مرحبا, said Tom.",
    "Mia \\u0041 \x07 bell `tick` ${Max} %s </textarea>",
)


def words(page: ModelPage) -> list[str]:
    """The stories of a model without their begin-of-text tokens, and without what stands for parts of a character."""
    return [PART_OF_CHARACTER.sub("", "".join(story.tokens[1:])) for story in page.stories]


def test_every_model_shows_the_same_stories_and_tasks(report: Report) -> None:
    gated, dense = report.models
    assert (gated.name, dense.name) == ("gated", "dense")
    assert (gated.streams, dense.streams) == (("clean", "ablated"), ("clean",))
    assert words(gated) == words(dense)
    assert len(set(words(gated))) == 3
    assert [task.task for task in gated.tasks] == [task.task for task in dense.tasks]
    assert [task.about for task in gated.tasks] == [task.about for task in dense.tasks]


def test_every_unit_of_a_raster_is_found_by_its_name(report: Report) -> None:
    gated = report.models[0]
    names = [unit.name for unit in gated.units]
    assert len(set(names)) == len(names)
    for story in gated.stories:
        assert story.gates is not None
        mentioned = {unit.name: (unit.layer, unit.site) for unit in story.gates.units}
        assert len(mentioned) > 8
        pages = {unit.name: (unit.layer, unit.site) for unit in gated.units}
        assert mentioned.items() <= pages.items()


def test_a_model_without_gates(report: Report) -> None:
    dense = report.models[1]
    assert all(story.gates is None for story in dense.stories)
    assert all(unit.streams[0].mask_on is None and len(unit.streams) == 1 for unit in dense.units)
    assert {look.stream for story in dense.stories for look in story.looks} == {"clean"}
    assert len(dense.overview.losses.rows) == 1


def test_comparison_repeats_the_figures_of_the_models(report: Report) -> None:
    tables = {table.title: table for table in report.comparison}
    for table in report.comparison:
        assert table.columns[1:] == ("gated", "dense")
        assert all(len(row) == 3 for row in table.rows)
    rows = {row[0]: row[1:] for row in tables["Losses"].rows}
    own = [{row[0]: row for row in model.overview.losses.rows} for model in report.models]
    assert rows["clean loss, nats per token"] == (own[0]["clean"][1], own[1]["clean"][1])
    assert rows["ablated loss, nats per token"] == (own[0]["ablated"][1], "n/a")
    skills = {row[0]: row[1:] for row in tables["Skill"].rows}
    for i, task in enumerate(report.models[0].tasks):
        assert skills[f"{task.task}, clean"] == tuple(model.tasks[i].skill.rows[0][1] for model in report.models)
    kept = {row[0]: row[1:] for row in tables["Edges that ACDC keeps"].rows}
    for task in report.models[0].tasks:
        for ranking in task.rankings:
            if ranking.method == "ACDC":
                assert kept[f"{task.task}, {ranking.stream}"][0] == str(ranking.chosen)
    live = {row[0]: row[1:] for row in tables["Units"].rows}
    every = 2 * (16 + 64)
    found = sum(unit.streams[0].live for unit in report.models[0].units)
    assert live["live units, clean"][0] == f"{found / every:.1%}"


def test_json_and_back(report: Report, tmp_path: Path) -> None:
    path = save(report, tmp_path / "deep" / "report.json")
    assert read(path) == report
    assert json.loads(path.read_text(encoding="utf-8"))["models"][0]["name"] == "gated"
    for text in ('{"title": "no"}', "nothing", '{"kind": "Table", "title": "no"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a record of Report"):
            read(path)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_same_seed_same_report_and_nothing_written(gated_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_pages, "LABELLED", 60)
    before = contents(gated_run)
    options = {"n_stories": 1, "n_units": 2, "tasks": (), "progress": False}
    first = make_report([gated_run], seed=3, **options)
    assert make_report(str(gated_run), seed=3, **options) == first
    assert contents(gated_run) == before
    assert first.comparison == ()
    assert first.title == "gated"
    assert first.models[0].tasks == ()


def figures_of(unit: UnitPage) -> UnitPage:
    """A unit without its explanation, which is fitted on fewer snippets of a large model."""
    return dataclasses.replace(
        unit, streams=tuple(dataclasses.replace(s, explanation="", explanation_f1=None) for s in unit.streams)
    )


def test_a_large_model_is_measured_on_less(gated_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_pages, "LABELLED", 60)
    options = {"n_stories": 1, "n_units": 2, "tasks": ["ioi"], "progress": False}
    usual = make_report([gated_run], **options, n_tokens=16_000)
    monkeypatch.setattr(Subject, "parameters", 10**9)
    less = make_report([gated_run], **options)
    assert less.models[0].overview.losses == usual.models[0].overview.losses
    figures = [[figures_of(unit) for unit in made.models[0].units] for made in (usual, less)]
    assert figures[0] == figures[1]
    assert usual.models[0].tasks[0].skill.note.startswith("64 prompts")
    assert less.models[0].tasks[0].skill.note.startswith("16 prompts")


def test_strange_text_stays_text_and_a_run_may_lack_mlps_and_metrics(attention_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("\n".join(STRANGE), encoding="utf-8")
    found = make_report(
        [attention_run], text=str(path), n_stories=10, n_units=3, tasks=["ioi"], progress=False, title="</title>"
    )
    page = found.models[0]
    assert words(page) == list(STRANGE)
    assert found.title == "</title>"
    assert read(save(found, tmp_path / "report.json")) == found
    assert found.training is None
    assert {unit.site for unit in page.units} == {"attn"}
    assert "no MLP" in page.overview.facts[0].value
    assert page.tasks[0].rankings == ()
    assert "cannot do this task" in page.tasks[0].note


def test_one_bar_tells_the_phase_and_an_interrupt_leaves_no_file(
    gated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unit_pages, "specialization", stop)
    shown = []
    begin = Phases.begin

    def record(phases: Phases, *which: object) -> None:
        begin(phases, *which)
        shown.append(phases.bar.desc)

    monkeypatch.setattr(Phases, "begin", record)
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(gated_run), "-o", str(out), "--stories", "1", "--tasks", "ioi"]) == 130
    # after these come the closer look and labels
    names = ("losses", "stories", "ioi", "thresholds", "units")
    assert shown == [f"gated: {name} ({i} of 7)" for i, name in enumerate(names, 1)]
    assert list(tmp_path.rglob("*")) == []


class TestBadInput:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is measured before all is checked."""

        def measure_losses(*_: object) -> None:
            raise AssertionError("began to measure")

        monkeypatch.setattr(making, "measure_losses", measure_losses)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_stories": 0}, "n_stories=0 must be at least 1"),
            ({"n_units": -1}, "n_units=-1 must be 0 or more"),
            ({"n_tokens": 100}, "n_tokens=100 must be at least"),
            ({"methods": ["relp"]}, "method='relp' is not one of 'acdc', 'eap-ig', 'gate'"),
            ({"tasks": ["chess"]}, "'chess' is none of ioi, pronoun, object, repeated"),
            ({"device": "abacus"}, "abacus"),
        ],
    )
    def test_options(self, gated_run: Path, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_report([gated_run], progress=False, **options)

    @pytest.mark.parametrize(
        "options", [{"n_stories": 0}, {"n_units": -1}, {"methods": ["relp"]}, {"tasks": ["chess"]}]
    )
    def test_options_before_a_model_is_loaded(self, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(making, "open_subjects", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(ValueError, match=r"must be|is not one of|is none of"):
            make_report(["stories-local"], progress=False, **options)

    def test_runs(self, gated_run: Path, without_tokenizer: Path) -> None:
        with pytest.raises(ValueError, match="runs is empty"):
            make_report([])
        with pytest.raises(ValueError, match="is named twice"):
            make_report([gated_run, f"{gated_run}/../gated"])
        with pytest.raises(FileNotFoundError, match="no-such-run"):
            make_report([gated_run, "/no-such-run"])
        with pytest.raises(ValueError, match="mute has no tokenizer"):
            make_report([gated_run, without_tokenizer])

    def test_text(self, gated_run: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no-such-text\.txt"):
            make_report([gated_run], text="no-such-text.txt", progress=False)
        with pytest.raises(FileNotFoundError, match=r"no-such-task\.json"):
            make_report([gated_run], tasks=["no-such-task.json"], progress=False)
        (tmp_path / "empty.txt").write_text(" \n\n ")
        with pytest.raises(ValueError, match=r"empty\.txt is empty"):
            make_report([gated_run], text=str(tmp_path / "empty.txt"), progress=False)

    def test_a_model_that_does_not_know_its_text(self, gated, tmp_path: Path) -> None:
        gated.model.save_pretrained(tmp_path / "bare")
        with pytest.raises(ValueError, match="does not say on what text it was trained"):
            make_report([tmp_path / "bare"], progress=False)
        (tmp_path / "short.txt").write_text("Anna saw Ben.\nBen saw Anna.\n")
        with pytest.raises(ValueError, match="12 are needed"):
            make_report([tmp_path / "bare"], text=str(tmp_path / "short.txt"), progress=False)


def test_a_report_holds_records_alone(report: Report) -> None:
    """Frozen dataclasses, tuples, texts and numbers, so that equality means equality."""

    def check(value: object) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                check(getattr(value, field.name))
        elif isinstance(value, tuple):
            for part in value:
                check(part)
        else:
            assert value is None or type(value) in (str, int, float, bool), repr(value)

    check(report)
