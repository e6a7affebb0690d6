"""Circuits as figures: nodes by layer upward, edges in the colour of their scores.

The record holds names and scores; places, curves and colours are made when it is drawn, so that one record serves any
size of figure. On a page, the script that the report uses draws it, with a slider for the number of edges. Images are
drawn by plotly, whose edges are grouped by colour into a handful of traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sa_lens.circuits.find_and_judge import FoundCircuit
from sa_lens.circuits.graph import Circuit
from sa_lens.views.circuit_layout import Places, ScoreScale, arc, places_of
from sa_lens.views.drawing import Panels, PanelScript, register_panels, register_result
from sa_lens.views.records import CircuitEdge, CircuitMap, number
from sa_lens.views.theme import Palette, colour_bar, escape, label_axis, palette
from sa_lens.views.wording import METHODS, TASKS, mask_warnings, metric_words, skill_warnings

MOST_EDGES = 5000
"""Edges that a record holds unless told otherwise."""
_FOR_HOVER = 300
"""Up to this many edges, each answers the mouse at three places instead of one."""


def circuit_map(
    circuit: Circuit | FoundCircuit,
    *,
    skill: pd.DataFrame | float | None = None,
    title: str | None = None,
    most: int = MOST_EDGES,
) -> CircuitMap:
    """Returns a circuit with its settings and the model's skill in words, ready to be drawn.

    Warnings are those of the analysis. Where there are none, a pair accuracy below 0.8 and frozen masks give one.

    Args:
        circuit: a circuit, or what `sa_lens.circuits.find_circuit` found, which knows skill and warnings.
        skill: how well the model does the task: the table of `sa_lens.circuits.skill`, of which the row of
            the circuit's stream counts, or the pair accuracy from 0 to 1.
        title: heading; None: task, stream, method and number of edges, as `circuit.about` has them.
        most: edges to show; of a larger circuit those with the largest absolute scores, and the note says so.

    Raises:
        ValueError: a pair accuracy outside 0 to 1, a table of skill without the circuit's stream, `most` below 1.
    """
    if most < 1:
        raise ValueError(f"most={most} edges: show at least 1")
    warnings: list[str] = []
    if isinstance(circuit, FoundCircuit):
        skill = pd.DataFrame([circuit.skill]) if skill is None else skill
        warnings, circuit = [*circuit.warnings], circuit.circuit
    about = circuit.about
    edges = [
        CircuitEdge(str(edge.source), str(edge.destination), edge.port, number(circuit.score(edge))) for edge in circuit
    ]
    n = len(edges)
    if n > most:
        edges = sorted(edges, key=lambda edge: abs(edge.score or 0), reverse=True)[:most]
    graph = circuit.graph
    heads = {end for edge in edges for end in (edge.source, edge.destination) if ".h" in end}
    accuracy, words = _skill(about, skill)
    warnings = warnings or skill_warnings(accuracy) + mask_warnings(about.get("stream"), about.get("masks"))
    notes = [_method_note(about), words]
    notes.append(f"{n:,} of {len(graph):,} edges, {len(heads)} of {graph.n_layers * graph.n_heads} heads")
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
        warnings=tuple(warnings),
    )


register_result(Circuit, circuit_map)
register_result(FoundCircuit, circuit_map)


def _title(about: Mapping[str, Any], n: int) -> str:
    task, method = str(about.get("task", "")), str(about.get("method", ""))
    method = METHODS.get(method.lower().replace("_", "-"), method.replace("_", " "))
    parts = [TASKS.get(task, task), f"{about['stream']} stream" if "stream" in about else "", method]
    return ", ".join([*(part for part in parts if part), f"{n:,} edges"])


def _method_note(about: Mapping[str, Any]) -> str:
    parts = [f"tau {about['tau']:g}"] if isinstance(about.get("tau"), int | float) else []
    if about.get("stream") == "ablated" and about.get("masks"):
        parts.append(f"{about['masks']} masks")
    if about.get("ablation"):
        parts.append(f"{about['ablation']} ablation")
    if isinstance(about.get("n"), int):
        parts.append(f"{about['n']} pairs")
    if about.get("complete") is False:
        parts.append("search interrupted")
    return ", ".join(parts)


def _skill(about: Mapping[str, Any], skill: pd.DataFrame | float | None) -> tuple[float | None, str]:
    """Pair accuracy, as a number and in words."""
    if skill is None:
        return None, ""
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
    return accuracy, f"pair accuracy {accuracy:.2f}{interval}"


def _scale(about: Mapping[str, Any]) -> str:
    metric = metric_words(str(about.get("metric", "")))
    if about.get("method") == "acdc":
        return f"{'rise of ' if about.get('metric') in ('kl', 'answer_rank') else 'fall of '}{metric}"
    return f"score, {metric}" if metric else "score"


def _traces(record: CircuitMap, places: Places, scores: ScoreScale, colours: Palette) -> list[go.Scatter]:
    """Lines by colour, weak ones first, a trace of unseen markers that answer the mouse, and the nodes above them."""
    few = len(record.edges) <= _FOR_HOVER
    points = 40 if few else 10
    thin, wide = (1.2, 3.6) if few else (0.7, 2.2)
    pale, full = (0.8, 1.0) if few else (0.25, 0.95)
    lines: dict[int | None, tuple[list[float | None], list[float | None]]] = {}
    hover: list[tuple[float, float, str, float]] = []
    for edge in record.edges:
        x, y = arc(places, edge, points)
        into_x, into_y = lines.setdefault(None if edge.score is None else scores.bin(edge.score), ([], []))
        into_x += [*x, None]
        into_y += [*y, None]
        for share in (0.3, 0.5, 0.7) if few else (0.5,):
            i = round(share * (points - 1))
            place = 0.0 if edge.score is None else scores.place(edge.score)
            hover.append((x[i], y[i], _edge_text(edge, record.scale), place))
    weights = {key: -1.0 if key is None else scores.weight(key) for key in lines}
    traces = []
    for key in sorted(lines, key=weights.__getitem__):
        weight = max(0.0, weights[key])
        colour = colours.faint if key is None else scores.colour(key)
        traces.append(
            go.Scatter(
                x=lines[key][0],
                y=lines[key][1],
                mode="lines",
                line={"color": colour, "width": thin + weight * (wide - thin)},
                opacity=pale + weight * (full - pale),
                hoverinfo="skip",
                showlegend=False,
                name="edges",
            )
        )
    hover_x, hover_y, texts, hover_places = zip(*hover, strict=True) if hover else ((), (), (), ())
    traces.append(
        go.Scatter(
            x=hover_x,
            y=hover_y,
            mode="markers",
            marker={"size": 9, "opacity": 0, "color": hover_places, "coloraxis": "coloraxis"},
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            name="edge values",
        )
    )
    return [*traces, _node_trace(record, places, colours)]


def _edge_text(edge: CircuitEdge, scale: str) -> str:
    port = {"q": "query", "k": "key", "v": "value"}.get(edge.port, "input")
    value = "no score" if edge.score is None else f"{edge.score:.4g} {escape(scale)}"
    name = f"{edge.source} → {edge.destination}{'.' * bool(edge.port)}{edge.port}"
    return f"<b>{escape(name)}</b><br>{value}<br>into the {port} of {escape(edge.destination)}"


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
    symbols = ["circle" if ".h" in node else "diamond" if node in ("embed", "logits") else "square" for node in nodes]
    return go.Scatter(
        x=[places.nodes[node][0] for node in nodes],
        y=[places.nodes[node][1] for node in nodes],
        mode="markers+text",
        marker={
            "size": [places.node_size] * len(nodes),
            "symbol": symbols,
            "color": colours.background,
            "opacity": 1,
            "line": {"color": colours.text, "width": 1.3},
        },
        text=[node[1:].replace(".h", ".") if ".h" in node else node for node in nodes],
        textposition=[{"embed": "bottom center", "logits": "top center"}.get(node, "middle center") for node in nodes],
        textfont={"size": max(8, places.node_size * 0.36), "color": colours.text},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        name="nodes",
        cliponaxis=False,
    )


def _circuits(records: Sequence[CircuitMap], dark: bool) -> Panels:
    first = records[0]
    known = [edge.score for record in records for edge in record.edges if edge.score is not None]
    places, scores = places_of(records), ScoreScale(known, dark)
    layers = [f"layer {layer}" for layer in range(first.n_layers)]
    x = label_axis([], showticklabels=False, range=list(places.x_range))
    y = label_axis(layers, range=list(places.y_range))
    layout: dict[str, Any] = {"hovermode": "closest", "dragmode": "pan", "bottom": 20}
    if known:
        bar = colour_bar(first.scale, dark, len=0.8, x=1.02, **scores.ticks())
        layout["coloraxis"] = {
            "cmin": scores.ends[0],
            "cmax": scores.ends[1],
            "colorscale": scores.scale,
            "colorbar": bar,
        }
    traces: list[list[Any]] = [_traces(record, places, scores, palette(dark)) for record in records]
    axes = [(x, y)] * len(records)
    return Panels(traces, axes, places.width + 50, beside=140, gap=50, height=places.height + 20, layout=layout)


def _contents(records: Sequence[CircuitMap]) -> list[dict[str, Any]]:
    """Circuits for the script, the edges with the largest scores first."""
    first = records[0]
    for record in records:
        if (record.n_layers, record.n_heads) != (first.n_layers, first.n_heads):
            raise ValueError(
                f"side_by_side needs transformers of one shape, but {record.n_layers} layers of {record.n_heads} heads "
                f"are not {first.n_layers} of {first.n_heads}"
            )
    edges = [sorted(record.edges, key=lambda edge: abs(edge.score or 0), reverse=True) for record in records]
    return [{**vars(record), "edges": [*map(vars, own)]} for record, own in zip(records, edges, strict=True)]


register_panels(CircuitMap, _circuits, PanelScript("circuitPanels", _contents))
