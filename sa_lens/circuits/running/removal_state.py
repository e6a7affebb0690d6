"""What a search for circuits holds of a model: live nodes with their present values, and blocks of removals with what
they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.graph import Node


class Row(NamedTuple):
    """One removal in a block."""

    to: int
    """Input of the graph."""
    source: int
    """Source of the graph."""
    stays_out: bool
    """Whether the rows after it have this edge removed too."""


@dataclass
class Live:
    """A node from which a present way leads to the logits, and its present values."""

    node: Node
    source: int
    """Its place among the sources; -1 for the logits."""
    everywhere: bool
    """Whether it matters at all positions, or at the metric position alone."""
    inputs: list[int]
    """Its inputs: three of a head, one of others."""
    x: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)
    """Present value of each input."""
    qkv: list[Float[Tensor, "pair pos d_head"]] = field(default_factory=list)
    """Present query, key and value of a head."""
    mask: Float[Tensor, "pair pos width"] | None = None
    """The gate's mask of its units: as given at the metric position, ones elsewhere; None in the clean stream."""
    out: Tensor | None = None
    """`z` of a head `[pair, pos, d_head]`, output of an MLP `[pair, pos, d_model]`."""


class Changed(NamedTuple):
    """What a block changes at one node; the first axis is the row."""

    x: dict[int, Float[Tensor, "version pair pos d_model"]]
    """Inputs of a node whose own edges are removed, one a version."""
    qkv: dict[int, Tensor]
    """Changed queries (0), keys (1) and values (2)."""
    version: dict[int, list[int]]
    """The version of each entry of `x` that each row has, 0 being the present value. Where an input is missing, each
    row has its own."""
    out: Float[Tensor, "row pair pos ..."] | None
    """Change of `out`."""


@dataclass
class Block:
    """A block of removals that was tried."""

    rows: Sequence[Row]
    changed: dict[Node, Changed]
    """What the rows change, by node, in the order of computation."""
    costs: list[float] = field(default_factory=list)
    """The metric after each row's removal."""


def versions_by_row(rows: Sequence[Row], own: list[int]) -> list[int]:
    """For each row of a block, 1 + the place among `own` of the one whose state it has; 0: the present state."""
    versions, staying, mine = [], 0, {r: n + 1 for n, r in enumerate(own)}
    for r, row in enumerate(rows):
        version = mine.get(r, staying)
        versions.append(version)
        if r in mine and row.stays_out:
            staying = version
    return versions
