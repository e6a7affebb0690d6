"""Heat maps of any numbers, of patches and of attribution; the last two may become bars of single units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sa_lens.views.drawing import Panels, register_panels, register_result
from sa_lens.views.records import Axis, Bars, Colours, HeatMap, number, numbers
from sa_lens.views.theme import colour_at, colour_bar, colour_scale, escape, label_axis, write_on
from sa_lens.views.wording import TASKS, skill_warnings

WHAT = {
    "resid_pre": "residual stream",
    "resid_mid": "residual stream after attention",
    "resid_post": "residual stream after each layer",
    "attn_out": "attention outputs",
    "mlp_out": "MLP outputs",
    "heads": "heads",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "pattern": "attention patterns",
    "neurons": "neurons",
    "mlps": "MLPs",
    "attn_units": "attention units",
    "mask_attn": "attention masks",
    "mask_mlp": "MLP masks",
    "mask_heads": "masks of heads",
    "mask_attn_units": "masks of attention units",
    "mask_mlp_units": "masks of neurons",
}
"""Words for what was patched or attributed."""

MOST_NUMBERS = 80
"""Up to this many cells, each shows its number."""
_CELL, _NARROW, _ROW = 46, 24, 34
"""Pixels of a column, of the narrowest one, and of a row."""
_SEVERAL = 1000
"""Pixels that heat maps beside one another share, if their columns are then wide enough."""
_WIDEST = 1240
"""Pixels of the widest figure of heat maps beside one another; wider ones stand below one another."""
_BESIDE = 150
"""Pixels of the colour bar and the outer margins."""


def heat_map(
    values: Any,
    title: str,
    *,
    x: str = "head",
    y: str = "layer",
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    scale: str = "value",
    note: str = "",
    colours: Colours = "diverging",
) -> HeatMap:
    """Returns any table of numbers as a heat map, such as one number for each head of each layer.

    Args:
        values: numbers `[row, column]`: a tensor, an array or lists; NaN leaves a cell empty.
        title: heading.
        x: what the columns are.
        y: what the rows are; the first row is drawn at the bottom.
        x_labels: a label for each column; None: counted from 0.
        y_labels: a label for each row; None: counted from 0.
        scale: what the numbers mean, with their unit.
        note: a line below the heading.
        colours: `diverging`: centred at 0; `sequential`: from the smallest to the largest number.

    Raises:
        ValueError: not two dimensions, no numbers, or another number of labels than of rows or columns.
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values have the shape {list(array.shape)}, but a heat map shows numbers [row, column]")
    columns, rows = (
        Axis(name, tuple(map(str, range(size) if labels is None else labels)))
        for name, labels, size in ((x, x_labels, array.shape[1]), (y, y_labels, array.shape[0]))
    )
    return HeatMap(title, note, columns, rows, numbers(array), scale, colours)


def patch_map(
    table: pd.DataFrame, value: str | None = None, title: str | None = None, *, skill: float | None = None
) -> HeatMap | Bars:
    """Returns a table of patches or of attribution as a heat map, or as bars of single units.

    Rows of a heat map are layers; columns are positions or heads. If both vary, there is a row for each head.

    A warning stands in the figure where the model does not prefer the answer on the clean prompt, where its skill is
    below 0.8, and where masks are frozen.

    Args:
        table: from `sa_lens.circuits.patch` or `attribute_nodes`: one kind, stream and direction; or several kinds
            whose rows are whole layers (masks of attention and MLP), which become columns.
        value: column to show: `normalised` (default) or `value` of patches, `estimate` (default) or `effect` of
            attribution. Rows without a value, such as units whose effect was not measured, are left out of bars.
        title: heading; None: made of the table's settings.
        skill: the model's pair accuracy at the task, from 0 to 1, where it is known.

    Raises:
        ValueError: a skill outside 0 to 1, an empty table, several settings in one table, or more dimensions than a
            heat map has.
    """
    values = ("estimate", "effect") if "estimate" in table else ("normalised", "value")
    value = values[0] if value is None else value
    if value not in values:
        raise ValueError(f"value={value!r} must be {' or '.join(map(repr, values))}")
    if not len(table):
        raise ValueError("the table of patches is empty: there is nothing to show")
    for setting in ("task", "stream", "masks", "direction", "ablation", "metric", "n"):
        several = table[setting].unique() if setting in table else ()
        if len(several) > 1:
            raise ValueError(
                f"the table mixes {setting} {', '.join(map(str, several))}: show one at a time, or use side_by_side"
            )
    row = table.iloc[0]
    title = title if title is not None else _title(table, value)
    scale = _scale(row, value)
    if table["unit"].notna().any():
        table = table.dropna(subset=value).sort_values(value, key=abs, ascending=False, kind="stable")
        labels = tuple(_unit_label(row) for _, row in table.iterrows())
        bars = tuple(map(number, table[value]))
        return Bars(title, _note(row, value), labels, bars, scale, warnings=_warnings(row, skill))
    columns = [name for name in ("what", "position", "head") if table[name].nunique(dropna=True) > 1]
    rows = "layer"
    if columns == ["position", "head"]:
        columns, rows = ["position"], "layer.head"
        table = table.assign(
            **{rows: [f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]}
        )
    if len(columns) > 1:
        raise ValueError(
            f"the table has several values of {' and '.join(columns)} for each layer, a heat map shows one of them: "
            f"choose one {columns[0]}, such as table[table.{columns[0]} == {table[columns[0]].iloc[0]!r}]"
        )
    column = columns[0] if columns else "position"
    across = table[column].unique()
    down = sorted(table["layer"].unique()) if rows == "layer" else list(table[rows].unique())
    cells = table.pivot(index=rows, columns=column, values=value).reindex(index=down, columns=list(across))
    tokens = dict(zip(table[column], table["token"], strict=True)) if column == "position" and "token" in table else {}
    return HeatMap(
        title=title,
        note=_note(row, value),
        x=Axis({"what": "patched"}.get(column, column), tuple(_label(x, tokens.get(x, ""), column) for x in across)),
        y=Axis(rows, tuple(map(str, down))),
        values=numbers(cells.to_numpy(dtype=float, na_value=float("nan"))),
        scale=scale,
        warnings=_warnings(row, skill),
    )


register_result(pd.DataFrame, patch_map)


def _title(table: pd.DataFrame, value: str) -> str:
    row = table.iloc[0]
    kinds = " and ".join(WHAT.get(what, what) for what in table["what"].unique())
    masks = f", {row['masks']} masks" if row["stream"] == "ablated" else ""
    how = {"effect": ", exact effect", "estimate": ", estimate by gradient"}.get(value, "")
    return f"{TASKS.get(row['task'], row['task'])}: {kinds}{how}, {row['stream']} stream{masks}"


def _scale(row: pd.Series, value: str) -> str:
    metric = str(row["metric"]).replace("_", " ")
    return {"normalised": "share of the effect", "value": metric}.get(value, f"change of the {metric}")


def _note(row: pd.Series, value: str) -> str:
    metric = str(row["metric"]).replace("_", " ")
    pairs = f"{row['n']} {'pair' if row['n'] == 1 else 'pairs'}"
    if value in ("estimate", "effect"):
        alone = f"change of the {metric} when it alone is ablated ({row['ablation']}; negative: it helps)"
        return f"{alone}; {metric} {row['value']:.2f} before; {pairs}"
    how, one = {
        "denoise": ("values of the clean prompt put into the corrupt run", " (1: all restored)"),
        "noise": ("values of the corrupt prompt put into the clean run", " (1: all lost)"),
    }[row["direction"]]
    ends = f"{metric} {row['clean']:.2f} clean, {row['corrupt']:.2f} corrupt"
    return f"{how}{one if value == 'normalised' else ''}; {ends}; {pairs}"


def _warnings(row: pd.Series, skill: float | None) -> tuple[str, ...]:
    warnings = skill_warnings(skill)
    clean = row["clean"] if "clean" in row else row["value"]
    if row["metric"] == "logit_difference" and clean <= 0 and not warnings:
        warnings.append(
            f"the logit difference of the clean prompt is {clean:.2f}: the model does not prefer the answer, so "
            "what is shown explains little"
        )
    if row["stream"] == "ablated" and row["masks"] == "frozen":
        prompt = "corrupt" if row.get("direction") == "denoise" else "clean"
        done = "patched" if "direction" in row else "ablated"
        warnings.append(f"the frozen masks stay those of the unedited {prompt} prompt, whatever is {done}")
    return tuple(warnings)


def _unit_label(row: pd.Series) -> str:
    return row["unit"] if row["position"] in ("all", "end") else f"{row['unit']} at {row['position']}"


def _label(place: object, token: str, column: str) -> str:
    if column == "what":
        return WHAT.get(str(place), str(place))
    if column == "head" or isinstance(place, str) or not token:
        return str(place)
    if place == 0:
        # every prompt begins with the begin-of-text token, whatever a tokenizer calls it
        return "0 BOS"
    return f"{place} {token.strip() or repr(token)}"


def _limits(records: Sequence[HeatMap]) -> tuple[float, float]:
    """Ends of a colour scale that serves all the records; symmetric about 0 if diverging."""
    values = [v for record in records for row in record.values for v in row if v is not None]
    if not values:
        return -1, 1
    if records[0].colours == "diverging":
        most = max(abs(v) for v in values) or 1.0
        return -most, most
    return min(values), max(values)


def _trace(record: HeatMap, limits: tuple[float, float], dark: bool, cell: int) -> go.Heatmap:
    columns, rows = len(record.x.labels), len(record.y.labels)
    scale = colour_scale(record.colours, dark)
    low, high = limits
    written = columns * rows <= MOST_NUMBERS and cell > 1.3 * _NARROW
    return go.Heatmap(
        z=[list(row) for row in record.values],
        x=list(range(columns)),
        y=list(range(rows)),
        customdata=[[(escape(y), escape(x)) for x in record.x.labels] for y in record.y.labels],
        colorscale=scale,
        zmin=low,
        zmax=high,
        zmid=0 if record.colours == "diverging" else None,
        xgap=1.5,
        ygap=1.5,
        text=[
            [
                "" if value is None else write_on(colour_at(scale, (value - low) / (high - low or 1)), f"{value:.2f}")
                for value in row
            ]
            for row in record.values
        ]
        if written
        else None,
        texttemplate="%{text}" if written else None,
        textfont={"size": 11},
        hoverongaps=False,
        hovertemplate=(
            f"{record.y.title} %{{customdata[0]}}<br>{record.x.title} %{{customdata[1]}}<br>"
            f"<b>%{{z:.4f}}</b> {record.scale}<extra></extra>"
        ),
        colorbar=colour_bar(record.scale, dark, "right", tickformat=".2~f"),
        showscale=False,
    )


def _upright(record: HeatMap) -> bool:
    """Whether labels of columns are so long that they would run into one another, and stand upright instead."""
    return max(map(len, record.x.labels), default=0) > 5 and len(record.x.labels) > 8


def _below(record: HeatMap) -> int:
    """Pixels of the axis below the cells."""
    return 60 + (7 * max(map(len, record.x.labels)) if _upright(record) else 15)


def _height(record: HeatMap) -> int:
    """Pixels of the cells and the axis below them."""
    return _below(record) + max(3 * _ROW, _ROW * len(record.y.labels))


def _heat_maps(records: Sequence[HeatMap], dark: bool) -> Panels:
    n, widest = len(records), max(len(record.x.labels) for record in records)

    def panel(beside: int) -> tuple[int, int]:
        """Pixels of a column and of a panel, which is at least as wide as its title."""
        cell = _CELL if n == 1 else max(_NARROW, min(_CELL, _SEVERAL // (beside * widest)))
        return cell, max(8 * _CELL, widest * cell) + 40

    cell, width = panel(n)
    stacked = n > 1 and _BESIDE + n * width > _WIDEST
    if stacked:
        cell, width = panel(1)
    traces: list[list[Any]] = [[_trace(record, _limits(records), dark, cell)] for record in records]
    traces[-1][0].showscale = True
    axes = [
        (
            label_axis(record.x.labels, record.x.title, tickangle=-90 if _upright(record) else 0),
            label_axis(record.y.labels, record.y.title),
        )
        for record in records
    ]
    below = max(map(_below, records)) if stacked else None
    return Panels(traces, axes, width, beside=_BESIDE, gap=80, height=max(map(_height, records)), below=below)


register_panels(HeatMap, _heat_maps)
