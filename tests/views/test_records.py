"""Records go to JSON and back unchanged, and refuse what does not fit together."""

import json

import pytest

from sa_lens.views import read, save
from sa_lens.views.records import Attention, Axis, Bars, Curves, HeatMap, Line, from_json, numbers, to_json

RECORDS = [
    HeatMap(
        "IOI",
        "n = 2",
        Axis("head", ("0", "1")),
        Axis("layer", ("0",)),
        ((0.5, None),),
        "share",
    ),
    Bars("units", "", ("a", "b"), (1.0, -2.0), "share"),
    Curves("loss", "", "steps", "nats", (Line("run", "clean", (0.0, 1.0), (2.0, None)),)),
    Attention("layer 0", "", ("<|endoftext|>", " Lily"), ("clean",), ("0.0",), ((((1.0, 0.0), (0.25, 0.75)),),)),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_json_and_back(record, tmp_path):
    assert from_json(to_json(record)) == record
    assert json.loads(to_json(record))["kind"] == type(record).__name__
    assert read(save(record, tmp_path / "deep" / "record.json")) == record
    assert hash(record) == hash(from_json(to_json(record)))


def test_missing_numbers_become_none():
    assert numbers([[1, float("nan")], [float("inf"), 2]]) == ((1.0, None), (None, 2.0))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "Pie"}', '{"kind": "Bars", "title": "x"}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="not a record of HeatMap"):
        from_json(text)


def test_what_does_not_fit_is_refused():
    axis = Axis("a", ("0", "1"))
    with pytest.raises(ValueError, match="2 rows of 2 numbers"):
        HeatMap("t", "", axis, axis, ((1.0, 2.0),), "s")
    with pytest.raises(ValueError, match="1 labels for 2 values"):
        Bars("t", "", ("a",), (1.0, 2.0), "s")
    with pytest.raises(ValueError, match="2 places for 1 values"):
        Line("a", "", (0.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match="1 heads for 0 patterns"):
        Attention("t", "", ("a",), ("clean",), ("0.0",), ())
    with pytest.raises(ValueError, match=r"'t, 0.0': 2 streams for 1 patterns"):
        Attention("t", "", ("a",), ("clean", "ablated"), ("0.0",), ((((1.0,),),),))
