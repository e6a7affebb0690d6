"""Bars, and losses over training as metrics.jsonl has them."""

import json

import pytest

from sa_lens.views import draw, training_curves
from sa_lens.views.charts import MOST_BARS
from sa_lens.views.records import Bars


def run_folder(path, records):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def runs(tmp_path):
    gated = [
        {"kind": "train", "step": 10, "loss": 9.0, "clean": 4.0, "ablated": 5.0},
        {"kind": "eval", "step": 100, "clean_loss": 3.0, "ablated_loss": 3.5},
        {"kind": "eval", "step": 200, "clean_loss": 2.0, "ablated_loss": 2.5},
        {"kind": "sample", "step": 200, "clean": "Once", "ablated": "Once"},
    ]
    dense = [{"kind": "eval", "step": 100, "clean_loss": 2.9}, {"kind": "eval", "step": 200, "clean_loss": 1.9}]
    return {"local": run_folder(tmp_path / "local", gated), "baseline": run_folder(tmp_path / "none", dense)}


def test_losses_of_runs(runs):
    record = training_curves(runs)
    assert [(line.name, line.stream, line.x, line.y) for line in record.lines] == [
        ("local", "clean", (100, 200), (3.0, 2.0)),
        ("local", "ablated", (100, 200), (3.5, 2.5)),
        ("baseline", "clean", (100, 200), (2.9, 1.9)),
    ]
    figure = draw(record)
    assert [trace.name for trace in figure.data] == ["local, clean", "local, ablated", "baseline, clean"]
    assert [trace.line.dash for trace in figure.data] == ["solid", "dash", "solid"]
    assert figure.data[0].line.color == figure.data[1].line.color != figure.data[2].line.color
    assert list(figure.data[2].y) == [2.9, 1.9]
    by_folder = training_curves([runs["local"]], kind="train")
    assert [(line.name, line.stream, line.y) for line in by_folder.lines] == [
        ("local", "clean", (4.0,)),
        ("local", "ablated", (5.0,)),
    ]


def test_runs_that_cannot_be_drawn(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        training_curves([tmp_path])
    with pytest.raises(ValueError, match="no record of kind 'train'"):
        training_curves(runs, kind="train")
    with pytest.raises(ValueError, match="kind='loss'"):
        training_curves(runs, kind="loss")
    with pytest.raises(ValueError, match="at least one"):
        training_curves([])
    with pytest.raises(ValueError, match="called the same"):
        training_curves([runs["local"], runs["local"]])


def test_bars_show_the_first_and_say_so():
    record = Bars(
        "units", "n = 64", tuple(f"L0 neuron {i}" for i in range(60)), tuple(float(-i) for i in range(60)), "s"
    )
    figure = draw(record)
    assert len(figure.data[0].x) == MOST_BARS
    assert f"the first {MOST_BARS} of 60" in figure.layout.title.text
    assert list(figure.layout.yaxis.ticktext) == list(record.labels[:MOST_BARS])
    # plotly draws the first category at the bottom unless told otherwise
    assert figure.layout.yaxis.autorange == "reversed"
