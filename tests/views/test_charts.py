"""Bars, losses over training as metrics.jsonl has them, and counts of histograms as a loop has them."""

import json

import pandas as pd
import pytest
import torch
from characters import TOKENS, caches

from sa_lens.views import draw, faithfulness_chart, histogram, training_curves, unit_histogram
from sa_lens.views.charts import MOST_BARS
from sa_lens.views.records import Bars, from_json, to_json


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


def test_the_step_from_which_the_ablated_stream_is_trained(tmp_path):
    scheduled = [
        {"kind": "train", "step": 10, "clean": 5.0, "streams": 1},
        {"kind": "train", "step": 15, "clean": 4.0, "streams": 1},
        {"kind": "eval", "step": 15, "clean_loss": 4.1},
        {"kind": "train", "step": 20, "clean": 3.0, "ablated": 5.0, "streams": 2},
        {"kind": "eval", "step": 30, "clean_loss": 3.1, "ablated_loss": 3.9},
    ]
    record = training_curves([run_folder(tmp_path / "scheduled", scheduled)])
    assert [(moment.value, moment.label) for moment in record.moments] == [(15, "ablated stream trained from here")]
    assert [(line.stream, line.y) for line in record.lines] == [("clean", (4.1, 3.1)), ("ablated", (None, 3.9))]
    assert from_json(to_json(record)) == record
    assert draw(record).layout.shapes[0].x0 == 15


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


def curve(**columns):
    common = {
        "edges": [0, 10, 100, 479],
        "share": [0, 0.02, 0.2, 1],
        "f": [0.0, 0.4, 0.92, 1.0],
        "kl": [2.0, 1.0, 0.1, 0],
    }
    return pd.DataFrame({**common, "f_low": [0, 0.3, 0.9, 1.0], "f_high": [0, 0.5, 0.95, float("nan")], **columns})


def test_faithfulness_curves():
    record = faithfulness_chart(
        {"ACDC": curve(stream="ablated"), "EAP": curve(stream="clean").drop(columns="f_low")[::-1]}
    )
    assert record.x_scale == "log"
    acdc, eap = record.lines
    assert (acdc.name, acdc.stream, acdc.x, acdc.y) == ("ACDC", "ablated", (10, 100, 479), (0.4, 0.92, 1.0))
    assert (acdc.low, acdc.high) == ((0.3, 0.9, 1.0), (0.5, 0.95, None))
    assert eap.x == acdc.x
    assert [level.value for level in record.levels] == [0.9, 1.0]
    assert from_json(to_json(record)) == record
    figure = draw(record)
    band, first, second = figure.data
    assert band.name == "interval"
    assert list(band.y) == [0.5, 0.95, 0.9, 0.3], "a missing end leaves the band"
    assert (first.name, second.name) == ("ACDC, ablated", "EAP, clean")
    assert figure.layout.xaxis.type == "log"
    assert sorted(shape.y0 for shape in figure.layout.shapes) == [0.9, 1.0]


def test_one_table_of_several_curves():
    table = pd.concat(
        [curve(ranking=name, stream=stream) for name in ("eap", "gate") for stream in ("clean", "ablated")]
    )
    record = faithfulness_chart(table, x="share", y="kl", title="KL", note="IOI")
    assert [(line.name, line.stream) for line in record.lines] == [
        ("eap", "clean"),
        ("eap", "ablated"),
        ("gate", "clean"),
        ("gate", "ablated"),
    ]
    assert record.lines[0].y == (1.0, 0.1, 0.0)
    assert (record.levels, record.y_title) == ((), "KL from the full model, nats")
    with pytest.raises(ValueError, match=r"lacks \['f'\]"):
        faithfulness_chart(curve().drop(columns="f"))
    with pytest.raises(ValueError, match="y='g'"):
        faithfulness_chart(curve(), y="g")
    with pytest.raises(ValueError, match="no curve"):
        faithfulness_chart({})


def test_curves_of_both_orders_and_the_note_of_their_table():
    settings = {"task": "ioi", "n": 64, "metric": "logit_difference", "ablation": "resample"}
    table = pd.concat(
        [curve(ranking="eap", order=order, pair_accuracy=0.7, **settings) for order in ("absolute", "signed")]
    )
    record = faithfulness_chart(table)
    assert [line.name for line in record.lines] == ["eap, absolute", "eap, signed"]
    assert record.note == "IOI; logit difference; resample ablation; 64 pairs; pair accuracy 0.70"
    assert [warning.split(":")[0] for warning in record.warnings] == ["pair accuracy 0.70 is below 0.8"]
    assert "Warning: pair accuracy 0.70" in draw(record).layout.title.text
    assert faithfulness_chart(table[table.order == "signed"]).lines[0].name == "eap"
    assert faithfulness_chart(table, note="mine").note == "mine"


def test_warnings_of_the_analysis_name_their_curve():
    tables = {
        "EAP": curve(stream="clean", pair_accuracy=0.5, warnings=""),
        "gate": curve(stream="ablated", pair_accuracy=0.9, masks="frozen", warnings="f is unstable"),
    }
    assert faithfulness_chart(tables).warnings == ("gate, ablated: f is unstable",), "what the analysis says counts"
    silent = {name: table.drop(columns="warnings") for name, table in tables.items()}
    first, second = faithfulness_chart(silent).warnings
    assert first.startswith("EAP, clean: pair accuracy 0.50 is below 0.8")
    assert second.startswith("gate, ablated: the frozen masks of the clean prompt")
    assert faithfulness_chart({"EAP": curve()}).warnings == ()


def test_counts():
    values = {"a": [0.0, 0.5, 1.0, 2.0], "b": [2.0, 2.0]}
    record = histogram(values, "t", "x", bins=4)
    assert record.edges == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert [(one.name, one.counts) for one in record.series] == [("a", (1, 1, 1, 1)), ("b", (0, 0, 0, 2))]
    assert from_json(to_json(record)) == record
    figure = draw(record)
    assert [list(trace.y) for trace in figure.data] == [[1, 1, 1, 1], [0, 0, 0, 2]]
    assert figure.layout.yaxis.type == "log"
    for bad, words in (({}, "at least one"), ({"a": []}, "at least one"), ({"a": [float("nan")]}, "1 are not")):
        with pytest.raises(ValueError, match=words):
            histogram(bad, "t", "x")
    with pytest.raises(ValueError, match="bins=0"):
        histogram(values, "t", "x", bins=0)


def test_unit_in_both_streams(model, plain_model):
    blocks = torch.stack([TOKENS, TOKENS.flip(0)])
    record = unit_histogram(model, blocks, "L1.mlp.7", bins=5)
    clean, kept = [], []
    for tokens in blocks:
        cache = caches(model, tokens)
        clean += cache["clean"]["post", 1][0, :, 7].tolist()
        mask = cache["ablated"]["mask", 1, "mlp_gate"][0, :, 7]
        kept += [v for v, on in zip(cache["ablated"]["post", 1][0, :, 7].tolist(), mask.tolist(), strict=True) if on]
    assert sum(record.series[0].counts) == len(clean) == 14
    edges, near = record.edges, 1e-5  # the two ways of computing a value differ in the last bits
    for one, values in zip(record.series, (clean, kept), strict=False):
        for i, count in enumerate(one.counts):
            surely = sum(edges[i] + near < value < edges[i + 1] - near for value in values)
            perhaps = sum(edges[i] - near <= value <= edges[i + 1] + near for value in values)
            assert surely <= count <= perhaps
    assert f"stays at {len(kept)} of them" in record.note
    assert len(unit_histogram(plain_model, blocks, "L1.attn.7").series) == 1
    with pytest.raises(ValueError, match="no unit"):
        unit_histogram(model, blocks, "L2.mlp.0")
