"""Heat maps of patching: a record of a table, the figure of a record, and both streams side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sa_lens.circuits.graph import Circuit
from sa_lens.views.circuit import circuits_side_by_side
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.records import Axis, Bars, CircuitMap, HeatMap, number, numbers
from sa_lens.views.theme import colour_scale, heading, palette, plain, template, wrapped
from sa_lens.views.words import TASKS

WHAT = {
    "resid_pre": "residual stream",
    "attn_out": "attention outputs",
    "mlp_out": "MLP outputs",
    "heads": "heads",
    "neurons": "neurons",
    "mask_attn": "attention masks",
    "mask_mlp": "MLP masks",
    "mask_heads": "masks of heads",
    "mask_attn_units": "masks of attention units",
    "mask_mlp_units": "masks of neurons",
}
"""Words for what was patched."""

MOST_NUMBERS = 80
"""Cells up to which each shows its number."""
_CELL, _NARROW, _ROW = 46, 24, 34
"""Pixels of a column, of the narrowest one, and of a row."""
_SEVERAL = 1000
"""Pixels that heat maps beside one another share, if their columns are then wide enough."""


def to_record(table: pd.DataFrame, value: str = "normalised", title: str | None = None) -> HeatMap | Bars:
    """The record of a table of patches: a heat map of layers by positions or heads, or bars of single units.

    Args:
        table: from `sa_lens.circuits.patch`: one kind, stream and direction; or several kinds whose rows are
            whole layers (masks of attention and MLP), which become columns.
        value: column to show: `normalised` or `value`.
        title: heading; None: made of the table's settings.

    Raises:
        ValueError: an empty table, several settings in one table, or more dimensions than a heat map has.
    """
    if value not in ("normalised", "value"):
        raise ValueError(f"value={value!r} must be 'normalised' or 'value'")
    if not len(table):
        raise ValueError("the table of patches is empty: there is nothing to show")
    for setting in ("task", "stream", "gates", "direction", "metric", "n"):
        found = table[setting].unique()
        if len(found) > 1:
            raise ValueError(
                f"the table mixes {setting} {', '.join(map(str, found))}: show one at a time, or use side_by_side"
            )
    one = table.iloc[0]
    title = title if title is not None else _title(table)
    scale = "share of the effect" if value == "normalised" else f"{one['metric']}".replace("_", " ")
    if table["neuron"].notna().any() or table["channel"].notna().any():
        labels = tuple(_unit_label(row) for _, row in table.iterrows())
        order = table[value].abs().sort_values(ascending=False, kind="stable").index
        place = {index: i for i, index in enumerate(table.index)}
        return Bars(
            title,
            _note(one),
            tuple(labels[place[index]] for index in order),
            tuple(number(table.loc[index, value]) for index in order),
            scale,
        )
    columns = [name for name in ("what", "position", "head") if table[name].nunique(dropna=True) > 1]
    if len(columns) > 1:
        raise ValueError(
            f"the table has several values of {' and '.join(columns)} for each layer, a heat map shows one of them: "
            f"choose one {columns[0]}, such as table[table.{columns[0]} == {table[columns[0]].iloc[0]!r}]"
        )
    column = columns[0] if columns else "position"
    across = table[column].unique()
    layers = sorted(int(layer) for layer in table["layer"].unique())
    values = table.pivot(index="layer", columns=column, values=value).reindex(index=layers, columns=list(across))
    tokens = dict(zip(table[column], table["token"], strict=True)) if column == "position" else {}
    names = {"position": "position", "head": "head", "what": "patched"}
    return HeatMap(
        title=title,
        note=_note(one),
        x=Axis(names[column], tuple(_label(at, tokens.get(at, ""), column) for at in across)),
        y=Axis("layer", tuple(map(str, layers))),
        values=numbers(values.to_numpy(dtype=float, na_value=float("nan"))),
        scale=scale,
    )


def _shared(titles: Sequence[str]) -> tuple[str, list[str]]:
    """The parts, between commas, with which all the titles begin, and what is left of each.

    Titles that begin differently, or are alike to the end of one, are left as they are, below the first one.
    """
    parts = [title.split(", ") for title in titles]
    n = next((i for i, some in enumerate(zip(*parts, strict=False)) if len(set(some)) > 1), min(map(len, parts)))
    if n == 0 or n == min(map(len, parts)):
        return titles[0], [*titles]
    return ", ".join(parts[0][:n]), [", ".join(some[n:]) for some in parts]


def _title(table: pd.DataFrame) -> str:
    one = table.iloc[0]
    kinds = " and ".join(WHAT.get(what, what) for what in table["what"].unique())
    gates = f", {one['gates']} gates" if one["stream"] == "ablated" else ""
    return f"{TASKS.get(one['task'], one['task'])}: {kinds}, {one['stream']} stream{gates}"


def _note(one: pd.Series) -> str:
    metric = str(one["metric"]).replace("_", " ")
    how = {
        "denoise": "values of the clean prompt put into the corrupt run (1: all restored)",
        "noise": "values of the corrupt prompt put into the clean run (1: all lost)",
    }
    ends = f"{metric} {one['clean']:.2f} clean, {one['corrupt']:.2f} corrupt"
    return f"{how[one['direction']]}; {ends}; {one['n']} {'pair' if one['n'] == 1 else 'pairs'}"


def _unit_label(row: pd.Series) -> str:
    unit = f"L{row['layer']} "
    unit += f"neuron {row['neuron']}" if pd.notna(row["neuron"]) else f"head {row['head']} channel {row['channel']}"
    return unit if row["position"] in ("all", "end") else f"{unit} at {row['position']}"


def _label(at: object, token: str, column: str) -> str:
    if column == "what":
        return WHAT.get(str(at), str(at))
    if column == "head" or isinstance(at, str) or not token:
        return str(at)
    if at == 0:
        # every prompt begins with the begin-of-text token, whatever a tokenizer calls it
        return "0 BOS"
    return f"{at} {token.strip() or repr(token)}"


def _limits(records: Sequence[HeatMap]) -> tuple[float, float]:
    """Ends of a colour scale that serves all the records; symmetric about 0 if diverging."""
    values = [v for record in records for row in record.values for v in row if v is not None]
    if not values:
        return -1, 1
    if records[0].colours == "diverging":
        most = max(abs(v) for v in values) or 1.0
        return -most, most
    return min(values), max(values)


def _trace(record: HeatMap, limits: tuple[float, float], dark: bool, cell: int = _CELL) -> go.Heatmap:
    small = len(record.x.labels) * len(record.y.labels) <= MOST_NUMBERS and cell > 1.3 * _NARROW
    columns, rows = len(record.x.labels), len(record.y.labels)
    names = [[(plain(y), plain(x)) for x in record.x.labels] for y in record.y.labels]
    return go.Heatmap(
        z=[list(row) for row in record.values],
        x=list(range(columns)),
        y=list(range(rows)),
        customdata=names,
        colorscale=colour_scale(record.colours, dark),
        zmin=limits[0],
        zmax=limits[1],
        zmid=0 if record.colours == "diverging" else None,
        xgap=1.5,
        ygap=1.5,
        texttemplate="%{z:.2f}" if small else None,
        textfont={"size": 11},
        hoverongaps=False,
        hovertemplate=(
            f"{record.y.title} %{{customdata[0]}}<br>{record.x.title} %{{customdata[1]}}<br>"
            f"<b>%{{z:.4f}}</b> {record.scale}<extra></extra>"
        ),
        colorbar={
            "title": {"text": record.scale, "side": "right", "font": {"size": 12, "color": palette(dark).faint}},
            "tickfont": {"size": 11},
            "thickness": 12,
            "outlinewidth": 0,
            "tickformat": ".2~f",
        },
    )


def _axes(record: HeatMap) -> tuple[dict[str, object], dict[str, object]]:
    axes = []
    for axis in (record.x, record.y):
        axes.append(
            {
                "title": {"text": axis.title},
                "tickvals": list(range(len(axis.labels))),
                "ticktext": [plain(label) for label in axis.labels],
                "showgrid": False,
                "zeroline": False,
            }
        )
    axes[0]["tickangle"] = -90 if _upright(record) else 0
    return axes[0], axes[1]


def _upright(record: HeatMap) -> bool:
    """Whether labels of columns are so long that they would run into one another, and stand upright instead."""
    return max(map(len, record.x.labels), default=0) > 5 and len(record.x.labels) > 8


def _height(record: HeatMap) -> int:
    """Pixels of the cells and the axis below them."""
    below = 60 + (7 * max(map(len, record.x.labels)) if _upright(record) else 15)
    return below + max(3 * _ROW, _ROW * len(record.y.labels))


@draw.register
def figure(record: HeatMap, *, dark: bool = False) -> Figure:
    """The figure of a heat map."""
    shown = Figure(_trace(record, _limits([record]), dark))
    x, y = _axes(record)
    width = 190 + max(7 * _CELL, _CELL * len(record.x.labels))
    title, room = heading(record.title, record.note, width, dark)
    shown.update_layout(
        template=template(dark),
        title=title,
        xaxis=x,
        yaxis=y,
        width=width,
        height=room + _height(record),
        margin={"t": room},
    )
    return shown


@draw.register
def figure_of_table(table: pd.DataFrame, *, dark: bool = False) -> Figure:
    """The figure of a table of patches."""
    return draw(to_record(table), dark=dark)


def side_by_side(
    shown: Sequence[HeatMap | Bars | pd.DataFrame | CircuitMap | Circuit],
    title: str = "",
    *,
    names: Sequence[str] | None = None,
    dark: bool = False,
) -> Figure:
    """Heat maps or circuits next to one another on one colour scale, such as one for each stream or model.

    Args:
        shown: records of heat maps, or tables of patches; or circuits, or records of them.
        title: heading; empty: what their headings begin with alike.
        names: a name above each; default: their headings, without what the title says of all.
        dark: the dark look.

    Raises:
        ValueError: fewer than two, something that is no heat map, two that mean different things by colour, circuits
            of transformers of different shapes.
    """
    circuits = [one for one in shown if isinstance(one, CircuitMap | Circuit)]
    if circuits and len(circuits) == len(shown):
        return circuits_side_by_side(circuits, title, names=names, dark=dark)
    heat_maps: list[HeatMap] = []
    for one in shown:
        record = to_record(one) if isinstance(one, pd.DataFrame) else one
        if not isinstance(record, HeatMap):
            raise ValueError(f"side_by_side shows heat maps, not {type(record).__name__}")
        heat_maps.append(record)
        if (record.scale, record.colours) != (heat_maps[0].scale, heat_maps[0].colours):
            raise ValueError(f"side_by_side has one colour scale, but {record.scale!r} is not {heat_maps[0].scale!r}")
    if len(heat_maps) < 2:
        raise ValueError(f"side_by_side needs two heat maps or more, not {len(heat_maps)}")
    alike, rest = _shared([record.title for record in heat_maps])
    if names is None:
        names = [record.title for record in heat_maps] if title else rest
    if len(names) != len(heat_maps):
        raise ValueError(f"{len(names)} names for {len(heat_maps)} heat maps")
    colours = palette(dark)
    # the width that a subplot title may take before it runs into the next
    widest = max(len(record.x.labels) for record in heat_maps)
    cell = max(_NARROW, min(_CELL, _SEVERAL // (len(heat_maps) * widest)))
    each = max(8 * _CELL, widest * cell) + 40
    all_notes = list(dict.fromkeys(record.note for record in heat_maps))
    captions = [
        f"<b>{wrapped(name, each)}</b>"
        + (f"<br><span style='font-size:11px;color:{colours.faint}'>{wrapped(record.note, each)}</span>")
        * (len(all_notes) > 1)
        for name, record in zip(names, heat_maps, strict=True)
    ]
    figure = make_subplots(
        rows=1,
        cols=len(heat_maps),
        subplot_titles=captions,
        horizontal_spacing=0.1 / (len(heat_maps) - 1),
        figure=Figure(),
    )
    figure.update_annotations(font_size=13, font_color=colours.text, yanchor="bottom")
    limits = _limits(heat_maps)
    for column, record in enumerate(heat_maps, 1):
        trace = _trace(record, limits, dark, cell)
        trace.showscale = column == len(heat_maps)
        figure.add_trace(trace, row=1, col=column)
        x, y = _axes(record)
        figure.update_xaxes(x, row=1, col=column)
        figure.update_yaxes(y, row=1, col=column)
    lines = max(caption.count("<br>") for caption in captions)
    width = 150 + each * len(heat_maps)
    above, room = heading(title or alike, all_notes[0] if len(all_notes) == 1 else "", width, dark)
    room += 20 + 17 * lines
    figure.update_layout(
        template=template(dark),
        title=above,
        width=width,
        height=room + max(map(_height, heat_maps)),
        margin={"t": room},
    )
    return figure
