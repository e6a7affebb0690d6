"""Where the nodes of a circuit stand, how its edges run, and which colours its scores have.

Layers go upward. Heads of a layer share a row, in an order that keeps connected ones near each other; MLPs have a lane
of their own on the right; the embedding is below, the logits above. Nodes without an edge have no place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sa_lens.views.records import CircuitEdge, CircuitMap
from sa_lens.views.theme import colour_at, strong_scale

SWEEPS = 12
"""Passes up and down that order the heads of a row."""
_ROW = 96
"""Pixels of a layer."""
_LANE = 0.16
"""Distance of the lane of MLPs from the heads, as a share of the heads' width."""
_PORTS = {"q": -0.3, "k": 0.0, "v": 0.3}
"""Where an edge arrives, in diameters of the node from its middle."""
BINS = 5
"""Colours for each sign of a score."""


@dataclass(frozen=True)
class Places:
    """The layout: x from 0 to 1 for heads, y in layers."""

    nodes: dict[str, tuple[float, float]]
    """Place of each node, in the order of computation."""
    slot: float
    """Width that a head may take."""
    pixel: float
    """Width of a pixel."""
    node_size: float
    """Diameter of a node, in pixels."""
    width: int
    """Of the drawing, in pixels."""
    height: int
    """Of the drawing, in pixels."""
    x_range: tuple[float, float]
    """Ends of the x axis."""
    y_range: tuple[float, float]
    """Ends of the y axis."""


def places_of(records: Sequence[CircuitMap]) -> Places:
    """Returns one layout for circuits of transformers of one shape."""
    n_layers = max(record.n_layers for record in records)
    links: dict[str, dict[str, float]] = {}
    for record in records:
        for edge in record.edges:
            for node, other in ((edge.source, edge.destination), (edge.destination, edge.source)):
                links.setdefault(node, {})
                links[node][other] = links[node].get(other, 0.0) + 1.0
    rows: list[list[str]] = [[] for _ in range(n_layers)]
    for node in sorted((node for node in links if ".h" in node), key=_head):
        rows[_head(node)[0]].append(node)
    most = max([len(row) for row in rows] + [1])
    heads = _order(rows, links)
    lane = 1 + _LANE
    nodes: dict[str, tuple[float, float]] = {}
    if "embed" in links:
        nodes["embed"] = (0.5, -0.75)
    for layer, row in enumerate(rows):
        nodes |= {node: (heads[node], float(layer)) for node in sorted(row, key=_head)}
        if f"m{layer}" in links:
            nodes[f"m{layer}"] = (lane, layer + 0.45)
    if "logits" in links:
        nodes["logits"] = (0.5, n_layers - 0.1)
    size = 30.0 if most <= 12 else max(15.0, 30 - (most - 12))
    width = int(min(1150, max(520, most * (size + 22) * (1 + _LANE + 0.2))))
    x_range = (-0.08, lane + 0.14)
    return Places(
        nodes=nodes,
        slot=1 / most,
        pixel=(x_range[1] - x_range[0]) / width,
        node_size=size,
        width=width,
        height=_ROW * (n_layers + 1),
        x_range=x_range,
        y_range=(-1.1, n_layers + 0.3),
    )


def _head(node: str) -> tuple[int, int]:
    layer, head = node[1:].split(".h")
    return int(layer), int(head)


def _spread(row: Sequence[str], x: dict[str, float]) -> None:
    for i, node in enumerate(row):
        x[node] = (i + 0.5) / len(row)


def _order(rows: list[list[str]], links: dict[str, dict[str, float]]) -> dict[str, float]:
    """x of each head: rows sorted, again and again, by the mean place of what their heads are connected to.

    Source: Sugiyama, Tagawa and Toda (1981), the barycentre method.
    """
    x: dict[str, float] = {}
    for row in rows:
        _spread(row, x)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            means = {}
            for node in row:
                near = [(x[other], weight) for other, weight in links[node].items() if other in x]
                total = sum(weight for _, weight in near)
                # the lane of MLPs is on the right; the embedding and the logits, in the middle, pull nobody
                lane = sum(weight for other, weight in links[node].items() if other.startswith("m"))
                total += 0.5 * lane
                means[node] = (sum(place * weight for place, weight in near) + 0.5 * lane) / total if total else x[node]
            row.sort(key=lambda node: (means[node], _head(node)))
            _spread(row, x)
    return x


def arc(places: Places, edge: CircuitEdge, points: int) -> tuple[list[float], list[float]]:
    """Returns the curve of an edge: upward and in from below; between MLPs on the outer side of their lane.

    Args:
        points: how many points it has.
    """
    (x0, y0), (x3, y3) = places.nodes[edge.source], places.nodes[edge.destination]
    # queries arrive at the left of a head, keys in the middle, values at the right
    x3 += _PORTS.get(edge.port, 0.0) * places.node_size * places.pixel
    rise = y3 - y0
    x1, y1, x2, y2 = x0, y0 + 0.45 * rise, x3, y3 - 0.45 * rise
    if edge.source.startswith("m") and edge.destination.startswith("m"):
        bow = 0.05 + 0.03 * rise
        x1, x2 = x0 + bow, x3 + bow
    elif {edge.source, edge.destination} == {"embed", "logits"}:
        x1 = x2 = -0.25
    elif rise > 1 and edge.destination != "logits" and edge.source != "embed":
        # a long edge bends to the side, so that it does not run through the nodes between
        bend = min(0.05, 0.35 * places.slot) * (1 if x0 + x3 >= 1 else -1)
        x1, x2 = x1 + bend, x2 + bend
    x, y = [], []
    for i in range(points):
        t = i / (points - 1)
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        x.append(round(a * x0 + b * x1 + c * x2 + d * x3, 4))
        y.append(round(a * y0 + b * y1 + c * y2 + d * y3, 4))
    return x, y


class ScoreScale:
    """Gives scores their colours, spread by asinh, so that a few large ones leave the others apart.

    Args:
        scores: all that will be shown.
        dark: the dark look.
    """

    def __init__(self, scores: Sequence[float], dark: bool = False) -> None:
        known = sorted(abs(score) for score in scores if score)
        self.unit = known[len(known) // 2] if known else 1.0
        low, high = min(scores, default=0.0), max(scores, default=1.0)
        self.signed = low < 0
        if self.signed:
            most = max(-low, high)
            low, high = -most, most
        elif low == high:
            low, high = min(0.0, low), high or 1.0
        self.ends = (self.place(low), self.place(high))
        self.scale = strong_scale("diverging" if self.signed else "sequential", dark)
        self.limits = (low, high)

    def place(self, score: float) -> float:
        """Place of a score on the spread axis."""
        return math.asinh(score / self.unit)

    def share(self, score: float) -> float:
        """Place of a score from 0 to 1."""
        low, high = self.ends
        return (self.place(score) - low) / (high - low)

    def bin(self, score: float) -> int:
        """Group of a score."""
        n = 2 * BINS if self.signed else BINS
        return min(n - 1, int(self.share(score) * n))

    def colour(self, index: int) -> str:
        """Colour of a group."""
        return colour_at(self.scale, (index + 0.5) / (2 * BINS if self.signed else BINS))

    def weight(self, index: int) -> float:
        """How strong a group is, from 0 to 1."""
        return (abs(index - BINS + 0.5) - 0.5) / (BINS - 1) if self.signed else index / (BINS - 1)

    def ticks(self) -> dict[str, Any]:
        """Round scores at some distance from one another, as plotly's places and texts."""
        low, high = self.limits
        most = max(abs(low), abs(high))
        size = math.floor(math.log10(most))
        rounds = [digit * 10.0**power for power in range(size, size - 4, -1) for digit in (5, 2, 1)]
        candidates = [0.0, *rounds, *(-x for x in rounds)]
        apart = (self.ends[1] - self.ends[0]) / 9
        chosen: list[float] = []
        for score in candidates:
            if low <= score <= high and all(abs(self.place(score) - self.place(c)) >= apart for c in chosen):
                chosen.append(score)
        chosen.sort()
        return {"tickvals": [self.place(score) for score in chosen], "ticktext": [f"{score:g}" for score in chosen]}
