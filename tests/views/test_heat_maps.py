"""A figure shows the numbers and labels of its record, the record those of the table."""

import pandas as pd
import plotly.io as pio
import pytest
import torch

from sa_lens.circuits.patching.activation_patching import COLUMNS
from sa_lens.views import draw, heat_map, patch_map, side_by_side
from sa_lens.views.records import Axis, Bars, HeatMap


def table(what="resid_pre", *, rows, **settings):
    """A table of patches; each row is (layer, position, head, neuron, value)."""
    common = {
        **{"task": "ioi", "what": what, "token": "", "clean": 3.0, "corrupt": -1.0, "n": 64},
        **{"metric": "logit_difference", "direction": "denoise", "stream": "clean", "masks": "none"},
    }
    made = pd.DataFrame(
        [
            {
                **common,
                "layer": layer,
                "position": position,
                "head": head,
                "value": value,
                "unit": None if neuron is None else f"L{layer}.mlp.{neuron}",
            }
            for layer, position, head, neuron, value in rows
        ],
        columns=list(COLUMNS),
    ).assign(**settings)
    made["normalised"] = (made["value"] + 1) / 4
    return made.astype({"head": "Int64"})


POSITIONS = [
    (layer, at, None, None, 4 * layer + i - 1) for layer in range(2) for i, at in enumerate(("IO", "S1", "end"))
]
HEADS = [(layer, "all", head, None, 4 * (head - layer) - 1) for layer in range(3) for head in range(2)]


def test_record_of_positions():
    record = patch_map(table(rows=POSITIONS))
    assert record.x == Axis("position", ("IO", "S1", "end"))
    assert record.y == Axis("layer", ("0", "1"))
    assert record.values == ((0.0, 0.25, 0.5), (1.0, 1.25, 1.5))
    assert record.title == "IOI: residual stream, clean stream"
    assert "; 64 pairs" in record.note
    assert "logit difference 3.00 clean, -1.00 corrupt" in record.note
    assert patch_map(table(rows=POSITIONS), "value").values == ((-1, 0, 1), (3, 4, 5))
    assert patch_map(table(rows=POSITIONS), title="Mine").title == "Mine"


def test_warnings_stand_below_the_title():
    assert patch_map(table(rows=POSITIONS), skill=0.8).warnings == ()
    low = patch_map(table(rows=POSITIONS), skill=0.5)
    assert low.warnings[0].startswith("pair accuracy 0.50 is below 0.8")
    assert "Warning: pair accuracy 0.50" in draw(low).layout.title.text
    wrong = patch_map(table(rows=POSITIONS, clean=-0.5))
    assert wrong.warnings[0].startswith("the logit difference of the clean prompt is -0.50")
    frozen = {"stream": "ablated", "masks": "frozen"}
    for direction, prompt in (("denoise", "corrupt"), ("noise", "clean")):
        (warning,) = patch_map(table(rows=POSITIONS, direction=direction, **frozen)).warnings
        assert f"those of the unedited {prompt} prompt" in warning
    # below the panel that it is about, where others have none
    figure = side_by_side([table(rows=POSITIONS), table(rows=POSITIONS, **frozen)])
    texts = [annotation.text.replace("<br>", " ") for annotation in figure.layout.annotations[:2]]
    assert ["Warning: the frozen masks" in text for text in texts] == [False, True]
    with pytest.raises(ValueError, match="skill=93 must be a pair accuracy"):
        patch_map(table(rows=POSITIONS), skill=93)


def test_record_keeps_the_order_of_the_table_and_names_tokens():
    rows = [(0, at, None, None, at) for at in (2, 10, 0)]
    record = patch_map(table(rows=rows).assign(token=[" went", " to", "<|endoftext|>"]))
    assert record.x.labels == ("2 went", "10 to", "0 BOS")


def test_record_of_heads_and_of_layers():
    record = patch_map(table("heads", rows=HEADS, stream="ablated", masks="frozen"))
    assert record.x == Axis("head", ("0", "1"))
    assert record.values == ((0.0, 1.0), (-1.0, 0.0), (-2.0, -1.0))
    assert record.title == "IOI: heads, ablated stream, frozen masks"
    masks = pd.concat([table(what, rows=[(0, "end", None, None, 1)]) for what in ("mask_attn", "mask_mlp")])
    record = patch_map(masks)
    assert record.x.labels == ("attention masks", "MLP masks")


def test_heads_at_positions_are_rows():
    rows = [(layer, at, head, None, layer + 2 * head + at) for layer in (0, 10) for head in (0, 1) for at in (3, 5)]
    record = patch_map(table("heads", rows=rows).assign(token=" a"), "value")
    assert record.x == Axis("position", ("3 a", "5 a"))
    assert record.y == Axis("layer.head", ("0.0", "0.1", "10.0", "10.1"))
    assert record.values == ((3, 5), (5, 7), (13, 15), (15, 17))


def attribution(what, rows):
    """A table of attribution; each row is (layer, head, neuron, estimate, effect)."""
    common = {
        **{"task": "ioi", "what": what, "position": "all", "value": 2.5, "n": 1, "metric": "logit_difference"},
        **{"ablation": "resample", "stream": "ablated", "masks": "frozen"},
    }
    names = ("layer", "head", "unit", "estimate", "effect")
    return pd.DataFrame([{**common, **dict(zip(names, row, strict=True))} for row in rows])


def test_record_of_attribution():
    heads = attribution("heads", [(layer, head, None, layer + head, -head) for layer in (0, 1) for head in (0, 1)])
    record = patch_map(heads)
    assert record.values == ((0, 1), (1, 2))
    assert record.title == "IOI: heads, estimate by gradient, ablated stream, frozen masks"
    assert record.note == (
        "change of the logit difference when it alone is ablated (resample; negative: it helps); "
        "logit difference 2.50 before; 1 pair"
    )
    exact = patch_map(heads, "effect")
    assert exact.values == ((0, -1), (0, -1))
    assert record.scale == exact.scale == "change of the logit difference"
    with pytest.raises(ValueError, match="value='normalised' must be 'estimate' or 'effect'"):
        patch_map(heads, "normalised")
    units = attribution("neurons", [(0, None, "L0.mlp.3", 2.0, None), (1, None, "L1.mlp.4", -3.0, -1.0)])
    assert patch_map(units).labels == ("L1.mlp.4", "L0.mlp.3")
    assert patch_map(units, "effect").labels == ("L1.mlp.4",), "the other effect was not measured"


def test_record_of_units_is_bars_by_size():
    record = patch_map(table("neurons", rows=[(0, "all", None, 7, 0), (1, "all", None, 3, -9), (1, "IO", None, 4, 2)]))
    assert record == Bars(
        "IOI: neurons, clean stream",
        record.note,
        ("L1.mlp.3", "L1.mlp.4 at IO", "L0.mlp.7"),
        (-2.0, 0.75, 0.25),
        "share of the effect",
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (table(rows=[]), "empty"),
        (pd.concat([table(rows=POSITIONS), table(rows=POSITIONS, stream="ablated")]), "mixes stream clean, ablated"),
        (
            pd.concat([table(what, rows=POSITIONS) for what in ("attn_out", "mlp_out")]),
            r"choose one what, such as table\[table\.what == 'attn_out'\]",
        ),
    ],
)
def test_tables_that_are_no_heat_map(bad, message):
    with pytest.raises(ValueError, match=message):
        patch_map(bad)
    with pytest.raises(ValueError, match="value='mean'"):
        patch_map(bad, "mean")


@pytest.mark.parametrize("dark", [False, True])
def test_figure_shows_the_record(dark):
    record = patch_map(table(rows=POSITIONS))
    figure = draw(record, dark=dark)
    (trace,) = figure.data
    assert [tuple(row) for row in trace.z] == list(record.values)
    # zero is the middle of the colours, and no value lies beyond their ends
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1.5, 0, 1.5)
    assert list(figure.layout.xaxis.ticktext) == list(record.x.labels)
    assert list(figure.layout.yaxis.ticktext) == list(record.y.labels)
    assert record.scale == trace.colorbar.title.text
    assert record.title in figure.layout.title.text
    assert draw(table(rows=POSITIONS), dark=dark) == figure


def test_labels_are_text_not_markup():
    record = HeatMap("a < b", "", Axis("x", ("<|endoftext|>",)), Axis("y", ("0",)), ((1.0,),), "s")
    figure = draw(record)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;|endoftext|&gt;"]
    assert "a &lt; b" in figure.layout.title.text


def test_missing_and_constant_values_draw():
    record = HeatMap("t", "", Axis("x", ("0", "1")), Axis("y", ("0",)), ((None, None),), "s")
    assert draw(record).data[0].zmax == 1
    zeros = HeatMap("t", "", Axis("x", ("0", "1")), Axis("y", ("0",)), ((0.0, 0.0),), "s")
    assert draw(zeros).data[0].zmax == 1
    rising = HeatMap("t", "", Axis("x", ("0", "1")), Axis("y", ("0",)), ((2.0, 5.0),), "s", "sequential")
    assert (draw(rising).data[0].zmin, draw(rising).data[0].zmax) == (2, 5)


def test_many_columns_stand_below_one_another():
    def axes(columns):
        rows = [(0, at, None, None, at) for at in range(columns)]
        layout = side_by_side([table(rows=rows), table(rows=rows, stream="ablated", masks="live")]).layout
        assert layout.width <= 1280
        return layout.xaxis.domain, layout.xaxis2.domain, layout.yaxis.domain, layout.yaxis2.domain

    x, x2, y, y2 = axes(12)
    assert x[1] < x2[0]
    assert y == y2
    x, x2, y, y2 = axes(26)
    assert x == x2
    assert y[0] > y2[1], "the first is above"


def test_side_by_side_shares_the_colours():
    clean, ablated = table(rows=POSITIONS), table("heads", rows=HEADS, stream="ablated", masks="frozen")
    figure = side_by_side([clean, patch_map(ablated)], "Both streams", names=["clean", "ablated"])
    one, two = figure.data
    assert (one.zmin, one.zmax) == (two.zmin, two.zmax) == (-2, 2)
    assert [one.showscale, two.showscale] == [False, True]
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert "clean" in texts[0]
    assert "ablated" in texts[1]
    assert "Both streams" in figure.layout.title.text
    for bad, message in (
        ([clean], "two heat maps or circuits, not 1"),
        ([clean, Bars("", "", (), (), "")], "not Bars"),
        ([clean, patch_map(ablated, "value")], "one colour scale"),
    ):
        with pytest.raises(ValueError, match=message):
            side_by_side(bad)
    with pytest.raises(ValueError, match="1 names for 2"):
        side_by_side([clean, ablated], names=["clean"])


def test_side_by_side_says_once_what_holds_for_all():
    streams = [table(rows=POSITIONS), table(rows=POSITIONS, stream="ablated", masks="frozen")]
    figure = side_by_side(streams)
    first, second = (note.text for note in figure.layout.annotations[:2])
    assert "residual stream" in figure.layout.title.text
    assert "clean stream" not in figure.layout.title.text
    assert first.startswith("<b>clean stream")
    assert second.startswith("<b>ablated stream, frozen masks")
    other = table("heads", rows=HEADS)
    assert "residual" in side_by_side([streams[0], other]).layout.annotations[0].text
    assert "residual" in side_by_side([streams[0], streams[0]]).layout.annotations[0].text


def test_no_theme_is_set_for_others():
    draw(table(rows=POSITIONS), dark=True)
    assert pio.templates.default == "plotly"


def test_what_has_no_figure():
    with pytest.raises(TypeError, match=r"no picture of a int; .* Bars, Circuit, CircuitMap, .*Curves"):
        draw(3)


def test_any_numbers_become_a_heat_map():
    values = [[1.0, float("nan"), -2.0], [0.5, 0.25, 4.0]]
    record = heat_map(torch.tensor(values, requires_grad=True), "Effects", scale="nats", note="16 blocks")
    assert record.values == ((1.0, None, -2.0), (0.5, 0.25, 4.0))
    assert (record.x, record.y) == (Axis("head", ("0", "1", "2")), Axis("layer", ("0", "1")))
    assert (record.title, record.note, record.scale, record.colours) == ("Effects", "16 blocks", "nats", "diverging")
    labelled = heat_map(values, "Effects", x="word", x_labels=["a", "b", "c"], y="kind", y_labels=["p", "q"])
    assert (labelled.x, labelled.y) == (Axis("word", ("a", "b", "c")), Axis("kind", ("p", "q")))
    assert labelled.values == record.values
    for wrong in (1.0, [1.0], [[]], [[[1.0]]]):
        with pytest.raises(ValueError, match=r"a heat map shows numbers \[row, column\]"):
            heat_map(wrong, "Effects")
    with pytest.raises(ValueError, match="2 rows of 2 numbers"):
        heat_map(values, "Effects", x_labels=["a", "b"])
