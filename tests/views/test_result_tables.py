"""Tables show numbers as they are read, intervals beside their values, and texts as texts."""

import pandas as pd
import pytest

from sa_lens.views import comparison_table, draw
from sa_lens.views.records import from_json, to_json

RESULTS = pd.DataFrame(
    {
        "model": ["<b>mine</b>", "baseline"],
        "pair_accuracy": [0.41234, float("nan")],
        "pair_accuracy_low": [0.3, 0.0],
        "pair_accuracy_high": [0.5, 1.0],
        "edges": [12345, 6],
        "able": [False, True],
    }
)


def test_cells():
    record = comparison_table(RESULTS, "Models", note="IOI")
    assert record.columns == ("model", "pair accuracy", "edges", "able")
    assert record.rows == (
        ("<b>mine</b>", "0.412 (0.3 to 0.5)", "12,345", "no"),
        ("baseline", "n/a", "6", "yes"),
    )
    assert record.numeric[:3] == (False, True, True)
    assert from_json(to_json(record)) == record
    assert comparison_table(RESULTS, "Models", columns=["edges", "model"]).rows[1] == ("6", "baseline")


def test_page():
    text = draw(comparison_table(RESULTS, "A <i>title</i>")).html()
    assert (text.count("<tr>"), text.count("<td")) == (3, 8)
    assert "&lt;b&gt;mine" in text
    assert "<i>" not in text
    assert "<script" not in text


def test_refusals():
    with pytest.raises(ValueError, match="empty"):
        comparison_table(RESULTS[:0], "t")
    with pytest.raises(ValueError, match=r"no column \['size'\]"):
        comparison_table(RESULTS, "t", columns=["size"])
    with pytest.raises(ValueError, match="digits=0"):
        comparison_table(RESULTS, "t", digits=0)
