"""The state of a search for circuits: live nodes with their present values, and blocks of removals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.removal_costs import Near
from sa_lens.core.nodes import InsideMLP


class Row(NamedTuple):
    """One removal in a block."""

    edges: Sequence[tuple[int, int]]
    """Input and source of each edge that is removed; usually one."""
    stays_out: bool = True
    """Whether the rows after it have these edges removed too."""


@dataclass
class Live:
    """A node with a path of present edges to the logits, and its present values."""

    node: Node
    source: int
    """Index of the node among the sources; -1 for the logits."""
    everywhere: bool
    """Whether it has an effect at all positions, or only at the metric position."""
    inputs: list[int]
    """Indices of its inputs: three for a head, one for others."""
    x: list[Float[Tensor, "row d_model"]] = field(default_factory=list)
    """Present value of each input."""
    qkv: list[Float[Tensor, "row d_head"]] = field(default_factory=list)
    """Present query, key and value of a head."""
    mask: Float[Tensor, "row width"] | None = None
    """Mask of its units: as given at the metric position, ones elsewhere; None in the clean stream."""
    out: Tensor | None = None
    """`z` of a head `[row, d_head]`, output of an MLP `[row, d_model]`."""
    inside: InsideMLP | None = None
    """Present values inside an MLP; None until an estimate needs them."""


class Changed(NamedTuple):
    """What a block changes at one node; the first axis is the removal."""

    x: dict[int, Float[Tensor, "version row d_model"]]
    """Inputs of a node whose own edges are removed, with one version per removal."""
    qkv: dict[int, Tensor]
    """Changed queries (0), keys (1) and values (2)."""
    version: dict[int, list[int]]
    """For each entry of `x`, the version that each row has; 0 is the present value. If an input is missing, each row
    has its own version."""
    out: Float[Tensor, "removal row ..."] | None = None
    """The change of `out`."""
    inside: InsideMLP | None = None
    """Values inside an MLP after the only removal of a block; None in a block of several."""
    mask: Float[Tensor, "removal pair width"] | None = None
    """Its mask, if its gate chooses again; None: as it was."""

    @classmethod
    def nothing(cls) -> Changed:
        """Returns no change, to which changes can be added."""
        return cls({}, {}, {})


@dataclass
class Block:
    """A block of removals that was tried."""

    rows: Sequence[Row]
    changed: dict[Node, Changed] = field(default_factory=dict)
    """What the rows change in the stream of the metric, by node, in the order of computation."""
    clean: dict[Node, Changed] = field(default_factory=dict)
    """What they change in the clean stream that live gates read."""
    moved: dict[int, Float[Tensor, "removal pair d_model"]] = field(default_factory=dict)
    """What they change of the residual stream that the gates of a layer read, by layer."""
    masks: dict[tuple[int, int], Float[Tensor, "removal pair unit"]] = field(default_factory=dict)
    """Masks that gates choose again, by layer and kind: attention units (0) or neurons (1)."""
    costs: list[float] = field(default_factory=list)
    """The metric after each row's removal."""
    near: Near | None = None
    """The state of the metric after the only removal of a block; None in a block of several."""


def versions_by_row(rows: Sequence[Row], own: list[int]) -> list[int]:
    """Returns the state of each row: 1 + the index in `own` of the last removal that acts on it, 0 without any."""
    versions, staying, mine = [], 0, {r: n + 1 for n, r in enumerate(own)}
    for r, row in enumerate(rows):
        version = mine.get(r, staying)
        versions.append(version)
        if r in mine and row.stays_out:
            staying = version
    return versions
