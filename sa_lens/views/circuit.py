"""Circuits as figures: nodes by layer upward, edges in the colour of their scores.

The record holds names and scores; places, curves and colours are made here, so that one record serves any size of
figure. Edges are grouped by colour into a handful of traces: a browser draws 2,000 of them as fast as 80.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from sa_lens.circuits.graph import Circuit
from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.layout import Places, arc, places_of
from sa_lens.views.records import CircuitEdge, CircuitMap, number
from sa_lens.views.score_scale import ScoreScale
from sa_lens.views.theme import Palette, heading, palette, plain, template, wrapped
from sa_lens.views.words import TASKS, metric_words

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["circuit_map", "circuits_side_by_side"]

MOST_EDGES = 5000
"""Edges that a record holds unless told otherwise."""
_FOR_HOVER = 300
"""Edges up to which each answers the mouse at three places, not at one."""


def circuit_map(
    circuit: Circuit,
    *,
    skill: pd.DataFrame | float | None = None,
    title: str | None = None,
    most: int = MOST_EDGES,
) -> CircuitMap:
    """The record of a circuit.

    Args:
        skill: how well the model does the task: the table of `sa_lens.circuits.metrics.skill`, of which the row of
            the circuit's stream counts, or the pair accuracy from 0 to 1. Below 0.8 the note carries a warning.
        title: heading; None: task, stream, method and number of edges, as `circuit.about` has them.
        most: edges to show; of a larger circuit those with the largest absolute scores, and the note says so.

    Raises:
        ValueError: a pair accuracy outside 0 to 1, a table of skill without the circuit's stream, `most` below 1.
    """
    if most < 1:
        raise ValueError(f"most={most} edges: show at least 1")
    about = circuit.about
    edges = [
        CircuitEdge(str(edge.source), str(edge.destination), edge.port, number(circuit.score(edge))) for edge in circuit
    ]
    n = len(edges)
    if n > most:
        edges = sorted(edges, key=lambda edge: abs(edge.score or 0), reverse=True)[:most]
    graph = circuit.graph
    notes = [_method_note(about), _skill_note(about, skill)]
    notes.append(f"{n:,} of {len(graph):,} edges, {_count_heads(edges)} of {graph.n_layers * graph.n_heads} heads")
    if n > most:
        notes.append(f"shown are the {most:,} with the largest scores")
    return CircuitMap(
        title=title if title is not None else _title(about, n),
        note="; ".join(note for note in notes if note),
        n_layers=graph.n_layers,
        n_heads=graph.n_heads,
        attn_only=graph.attn_only,
        n_edges=len(graph),
        edges=tuple(edges),
        scale=_scale(about),
    )


def _count_heads(edges: Sequence[CircuitEdge]) -> int:
    return len({end for edge in edges for end in (edge.source, edge.destination) if ".h" in end})


def _method(about: Mapping[str, Any]) -> str:
    name = str(about.get("method", ""))
    return {"acdc": "ACDC", "eap": "EAP", "eap-ig": "EAP-IG", "eap_ig": "EAP-IG", "relp": "RelP"}.get(
        name.lower(), name.replace("_", " ")
    )


def _title(about: Mapping[str, Any], n: int) -> str:
    task = str(about.get("task", ""))
    parts = [TASKS.get(task, task), f"{about['stream']} stream" if "stream" in about else "", _method(about)]
    return ", ".join([*(part for part in parts if part), f"{n:,} edges"])


def _method_note(about: Mapping[str, Any]) -> str:
    parts = [f"tau {about['tau']:g}"] if isinstance(about.get("tau"), int | float) else []
    if about.get("stream") == "ablated" and about.get("gates"):
        parts.append(f"{about['gates']} gates")
    if about.get("ablation"):
        parts.append(f"{about['ablation']} ablation")
    if isinstance(about.get("pairs"), int):
        parts.append(f"{about['pairs']} pairs")
    if about.get("complete") is False:
        parts.append("search interrupted")
    return ", ".join(parts)


def _skill_note(about: Mapping[str, Any], skill: pd.DataFrame | float | None) -> str:
    if skill is None:
        return ""
    if isinstance(skill, int | float):
        accuracy, interval = float(skill), ""
    else:
        stream = about.get("stream", "clean")
        rows = skill[skill["stream"] == stream]
        if not len(rows):
            raise ValueError(f"the table of skill has no row of the circuit's stream {stream!r}")
        row = rows.iloc[0]
        accuracy = float(row["pair_accuracy"])
        interval = f" ({row['pair_accuracy_low']:.2f} to {row['pair_accuracy_high']:.2f})"
    if not 0 <= accuracy <= 1:
        raise ValueError(f"skill={accuracy} must be a pair accuracy from 0 to 1")
    warning = "" if accuracy >= SKILL_BAR else f", below {SKILL_BAR:g}: the model cannot do this task"
    return f"pair accuracy {accuracy:.2f}{interval}{warning}"


def _scale(about: Mapping[str, Any]) -> str:
    metric = metric_words(str(about.get("metric", "")))
    if about.get("method") == "acdc":
        return f"{'rise of ' if about.get('metric') in ('kl', 'answer_rank') else 'fall of '}{metric}"
    return f"score, {metric}" if metric else "score"


def _edge_traces(record: CircuitMap, places: Places, scores: ScoreScale, colours: Palette) -> list[go.Scatter]:
    """Lines by colour, weak ones first, and one trace of unseen markers that answer the mouse."""
    n = len(record.edges)
    points = 40 if n <= _FOR_HOVER else 10
    widths = (1.2, 3.6) if n <= _FOR_HOVER else (0.7, 2.2)
    opacity = (0.8, 1.0) if n <= _FOR_HOVER else (0.25, 0.95)
    lines: dict[int | None, tuple[list[float | None], list[float | None]]] = {}
    hover_x: list[float] = []
    hover_y: list[float] = []
    hover_text: list[str] = []
    hover_place: list[float] = []
    for edge in record.edges:
        x, y = arc(places, edge, points)
        key = None if edge.score is None else scores.bin(edge.score)
        into_x, into_y = lines.setdefault(key, ([], []))
        into_x += [*x, None]
        into_y += [*y, None]
        for share in (0.3, 0.5, 0.7) if n <= _FOR_HOVER else (0.5,):
            at = round(share * (points - 1))
            hover_x.append(x[at])
            hover_y.append(y[at])
            hover_text.append(_edge_text(edge, record.scale))
            hover_place.append(0.0 if edge.score is None else scores.place(edge.score))
    traces = []
    for key in sorted(lines, key=lambda key: -1.0 if key is None else scores.weight(key)):
        weight = 0.0 if key is None else scores.weight(key)
        traces.append(
            go.Scatter(
                x=lines[key][0],
                y=lines[key][1],
                mode="lines",
                line={
                    "color": colours.faint if key is None else scores.colour(key),
                    "width": widths[0] + weight * (widths[1] - widths[0]),
                },
                opacity=opacity[0] + weight * (opacity[1] - opacity[0]),
                hoverinfo="skip",
                showlegend=False,
                name="edges",
            )
        )
    traces.append(
        go.Scatter(
            x=hover_x,
            y=hover_y,
            mode="markers",
            marker={"size": 9, "opacity": 0, "color": hover_place, "coloraxis": "coloraxis"},
            text=hover_text,
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            name="edge values",
        )
    )
    return traces


def _edge_text(edge: CircuitEdge, scale: str) -> str:
    port = {"q": "query", "k": "key", "v": "value"}.get(edge.port, "input")
    value = "no score" if edge.score is None else f"{edge.score:.4g} {plain(scale)}"
    name = f"{edge.source} → {edge.destination}{'.' * bool(edge.port)}{edge.port}"
    return f"<b>{plain(name)}</b><br>{value}<br>into the {port} of {plain(edge.destination)}"


def _node_trace(record: CircuitMap, places: Places, colours: Palette) -> go.Scatter:
    """Nodes with their names, which hide the lines below them."""
    entering: dict[str, list[float]] = {}
    leaving: dict[str, list[float]] = {}
    for edge in record.edges:
        entering.setdefault(edge.destination, []).append(abs(edge.score or 0))
        leaving.setdefault(edge.source, []).append(abs(edge.score or 0))
    used = set(entering) | set(leaving)
    nodes = [node for node in places.nodes if node in used]
    texts = [
        f"<b>{node}</b><br>{len(entering.get(node, ()))} edges in, {len(leaving.get(node, ()))} out<br>"
        f"sum of absolute scores {sum(entering.get(node, ())):.4g} in, {sum(leaving.get(node, ())):.4g} out"
        for node in nodes
    ]
    kinds = ["head" if ".h" in node else "end" if node in ("embed", "logits") else "mlp" for node in nodes]
    large = places.node_size
    return go.Scatter(
        x=[places.nodes[node][0] for node in nodes],
        y=[places.nodes[node][1] for node in nodes],
        mode="markers+text",
        marker={
            "size": [{"head": large, "mlp": large, "end": large}[kind] for kind in kinds],
            "symbol": [{"head": "circle", "mlp": "square", "end": "diamond"}[kind] for kind in kinds],
            "color": colours.background,
            "opacity": 1,
            "line": {"color": colours.text, "width": 1.3},
        },
        text=[_label(node) for node in nodes],
        textposition=[{"embed": "bottom center", "logits": "top center"}.get(node, "middle center") for node in nodes],
        textfont={"size": max(8, large * 0.36), "color": colours.text},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        name="nodes",
        cliponaxis=False,
    )


def _label(node: str) -> str:
    return node[1:].replace(".h", ".") if ".h" in node else node


def _axes(record: CircuitMap, places: Places) -> tuple[dict[str, Any], dict[str, Any]]:
    hidden = {"showgrid": False, "zeroline": False, "fixedrange": False}
    x = {**hidden, "showticklabels": False, "range": list(places.x_range)}
    y = {
        **hidden,
        "tickvals": list(range(record.n_layers)),
        "ticktext": [f"layer {layer}" for layer in range(record.n_layers)],
        "range": list(places.y_range),
    }
    return x, y


def _known(records: Sequence[CircuitMap]) -> list[float]:
    return [edge.score for record in records for edge in record.edges if edge.score is not None]


@draw.register
def figure_of_circuit(record: CircuitMap, *, dark: bool = False) -> Figure:
    """The figure of a circuit."""
    colours = palette(dark)
    places = places_of([record])
    scores = ScoreScale(_known([record]), dark)
    figure = Figure([*_edge_traces(record, places, scores, colours), _node_trace(record, places, colours)])
    x, y = _axes(record, places)
    width = places.width + 190
    title, room = heading(record.title, record.note, width, dark)
    figure.update_layout(
        template=template(dark),
        title=title,
        xaxis=x,
        yaxis=y,
        coloraxis=scores.axis(record.scale) if _known([record]) else None,
        width=width,
        height=places.height + room + 20,
        margin={"t": room, "b": 20},
        hovermode="closest",
        dragmode="pan",
    )
    return figure


@draw.register
def figure_of_a_found_circuit(circuit: Circuit, *, dark: bool = False, **options: Any) -> Figure:
    """The figure of a circuit; options are those of `circuit_map`."""
    return figure_of_circuit(circuit_map(circuit, **options), dark=dark)


def circuits_side_by_side(
    shown: Sequence[CircuitMap | Circuit],
    title: str = "",
    *,
    names: Sequence[str] | None = None,
    dark: bool = False,
) -> Figure:
    """Circuits of two models or streams on one colour scale; a node has the same place in each.

    Args:
        shown: circuits, or records of them, of transformers of one shape.
        title: heading; empty: the first one's.
        names: a name above each; default: their headings.
        dark: the dark look.

    Raises:
        ValueError: fewer than two, transformers of different shapes, scores that mean different things.
    """
    from plotly.subplots import make_subplots

    records = [circuit_map(one) if isinstance(one, Circuit) else one for one in shown]
    if len(records) < 2:
        raise ValueError(f"side_by_side needs two circuits or more, not {len(records)}")
    for record in records[1:]:
        if (record.n_layers, record.n_heads) != (records[0].n_layers, records[0].n_heads):
            raise ValueError(
                f"side_by_side needs transformers of one shape, but {record.n_layers} layers of {record.n_heads} heads "
                f"are not {records[0].n_layers} of {records[0].n_heads}"
            )
        if record.scale != records[0].scale:
            raise ValueError(f"side_by_side has one colour scale, but {record.scale!r} is not {records[0].scale!r}")
    names = [record.title for record in records] if names is None else list(names)
    if len(names) != len(records):
        raise ValueError(f"{len(names)} names for {len(records)} circuits")
    colours = palette(dark)
    places = places_of(records)
    scores = ScoreScale(_known(records), dark)
    captions = [
        f"<b>{wrapped(name, places.width - 20)}</b><br>"
        f"<span style='font-size:11px;color:{colours.faint}'>{wrapped(record.note, places.width - 20, 6)}</span>"
        for name, record in zip(names, records, strict=True)
    ]
    width = (places.width + 50) * len(records) + 140
    figure = make_subplots(
        rows=1,
        cols=len(records),
        subplot_titles=captions,
        horizontal_spacing=50 / (width - 140),
        figure=Figure(),
    )
    figure.update_annotations(font_size=13, font_color=colours.text, yanchor="bottom")
    for column, record in enumerate(records, 1):
        for trace in [*_edge_traces(record, places, scores, colours), _node_trace(record, places, colours)]:
            figure.add_trace(trace, row=1, col=column)
        x, y = _axes(record, places)
        figure.update_xaxes(x, row=1, col=column)
        figure.update_yaxes(y, row=1, col=column)
    above, room = heading(title or records[0].title, "", width, dark)
    room += 17 * (1 + max(caption.count("<br>") for caption in captions))
    figure.update_layout(
        template=template(dark),
        title=above,
        coloraxis=scores.axis(records[0].scale) if _known(records) else None,
        width=width,
        height=places.height + room + 20,
        margin={"t": room, "b": 20},
        hovermode="closest",
        dragmode="pan",
    )
    return figure
