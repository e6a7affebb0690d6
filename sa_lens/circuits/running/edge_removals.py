"""The metric after each of many removals of edges; only what a removal can change is computed again.

Edges are visited from the last layer to the first, and every input is

    base + sum over present edges of (what the source writes - what an absent edge carries)

where *present* means kept or not yet visited. Three facts make this cheap and exact:

- below the layer that is visited every edge is present, so all sources there write what they write on the clean prompt;
- a node without a path of present edges to the logits has no effect, and a node that only feeds the metric position
  (no key or value above it) has an effect at that position only;
- a removal at one node affects only the nodes above it to which present edges lead.

These nodes are computed for a whole block of rows at once; each row is a removal in addition to those before it.

Live gates read the clean stream with all that its nodes write, so a node also has an effect through the masks of the
layers above it. Its change is carried up the clean stream, the gates choose again, and the ablated stream is computed
again, at the metric position, from the first node on whose input or mask changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.expected_work import expected_work, work_of_tries
from sa_lens.circuits.running.removal_costs import Near, cost_of
from sa_lens.circuits.running.removal_lanes import EndLane, RemovalLane
from sa_lens.circuits.running.removal_state import Block, Live, Row
from sa_lens.core.live_gates import LocalGates
from sa_lens.core.products import faster_dtype

_BLOCK = 2**23
"""Largest number of entries in one activation of a whole block."""


WIDE = 512
"""Smallest d_model at which estimates are faster than exact tries."""

_OVERHEAD = 5e5
"""Work of a node in one try, however small it is."""


_ESTIMATED = (0.45, 0.75)
"""Work of nodes and of the metric in an estimate, as parts of that in an exact try (measured on SmolLM2-135M)."""


class Recomputation:
    """Computes the metric after removals, on the part of the model above the edges that are visited.

    Args:
        present: True for edges that are kept or not yet visited.
    """

    def __init__(self, exp: Experiment, present: Bool[Tensor, "input source"]) -> None:
        self.graph, self.functions = exp.graph, exp.nodes
        self.present = present.clone()
        self.lane: RemovalLane = (
            RemovalLane(exp, self.present, ("earlier", exp.stream))
            if exp.masks != "live"
            else EndLane(exp, self.present)
        )
        """The stream that the metric is computed from."""
        self.gates = _GatesOfSearch(exp, self.lane) if isinstance(self.lane, EndLane) else None
        """Live gates, with the clean stream that they read."""
        order = torch.cat([batch.rows for batch in exp.passes])
        clean = self.functions.normalise(self.final_clean())
        self.metric_work = float(self.functions.W_U.numel() * len(self.lane.last))
        self.cost = cost_of(exp.metric, self.functions, exp.pairs.subset(order), clean)
        self.work = 0.0
        """Work of all tries so far, about one multiplication per unit; with live gates, the work expected of them."""
        self.tries: dict[Node, float] = {}
        """With live gates, the work that is expected of a try of an edge into each node of the present step."""
        self.rounded_to = faster_dtype(self.lane.difference) if self.functions.cfg.d_model >= WIDE else None
        """Type of the products of estimates; None if estimates would not be faster."""
        self.near: Near | None = None
        """Present state of the metric; None until an estimate needs it."""

    # ------------------------------------------------------------------------------------------------------- steps

    def enter(self, places: Iterable[tuple[int, int]], *, compute: bool = True) -> set[Node]:
        """Goes down to the next step, whose edges (input, source) are given; returns its live nodes.

        Their edges are all present, except those that an interrupted search removed before it was resumed. The present
        values of all live nodes are computed from scratch, the lowest first, so that rounding does not accumulate.

        Args:
            compute: False if no edge of the step is to be tried.
        """
        nodes = sorted({self.graph.inputs[to].node for to, _ in places}, key=lambda node: node[1:])
        self.lane.enter(nodes)
        live = set(self.lane.here)
        if self.gates is not None:
            live |= self.gates.enter(nodes)
        if compute:
            if self.gates is not None:
                self.gates.choose_all()
            self.lane.compute()
        self.near = None
        if self.gates is not None:
            above = torch.tensor(self.graph.n_sources) > self.graph.sources_before(nodes[0])
            kept = self.present & above[:, None]
            self.tries = work_of_tries(self.graph, kept, self.work_of, self.metric_work, live_gates=True)
        return live

    def drop(self, places: Sequence[tuple[int, int]]) -> None:
        """Removes edges (input, source) into nodes that are not live."""
        if places:
            to, source = torch.tensor(places).T
            self.present[to, source] = False

    # ------------------------------------------------------------------------------------------------------- blocks

    def value(self) -> float:
        """Returns the metric of the full graph."""
        return self.cost.near(self.functions.normalise(self.final_clean())).cost

    def final_clean(self) -> Float[Tensor, "pair d_model"]:
        """Returns the final residual stream of the unedited clean prompts at the metric position."""
        return self.lane.take_last(self.lane.full_at[len(self.graph.sources)])

    @property
    def largest_block(self) -> int:
        """Largest number of rows in a block, limited by memory."""
        return max(4, min(16, _BLOCK // (self.lane if self.gates is None else self.gates.clean).difference[0].numel()))

    def _logits(self) -> Live:
        return next(item for item in (*self.lane.here.values(), *self.lane.above) if item.node.kind == "logits")

    def try_removals(self, rows: Sequence[Row]) -> Block:
        """Returns the metric after each removal of a block, in addition to the earlier rows that stay out.

        Args:
            rows: edges into live nodes of the present step.
        """
        block, final = self._try(rows, None)
        if len(rows) == 1:
            block.near = self.cost.near(final[0])
            block.costs = [block.near.cost]
        else:
            block.costs = self.cost(final).tolist()
        return block

    def estimate(self, rows: Sequence[Row]) -> list[float]:
        """Returns about what `try_removals` returns, in half the time; only if `rounded_to` is not None.

        Changes of MLPs and logits are computed from products that are rounded to a narrow type. What is rounded is the
        change, not the value, so that the error is a small part of the change.
        At positions at which the input of an MLP hardly changes, that change is neglected.
        """
        assert self.rounded_to is not None
        self.near = self.near or self.cost.near(self.functions.normalise(self._logits().x[0]))
        _, final = self._try(rows, self.rounded_to)
        return self.cost.estimate(final, self.near, self.rounded_to).tolist()

    def _try(
        self, rows: Sequence[Row], dtype: torch.dtype | None
    ) -> tuple[Block, Float[Tensor, "removal pair d_model"]]:
        """Returns what removals change, without costs, and the normalised final residual stream after each."""
        touched: dict[Node, list[int]] = {}
        for r, row in enumerate(rows):
            for node in dict.fromkeys(self.graph.inputs[to].node for to, _ in row.edges):
                touched.setdefault(node, []).append(r)
        block = Block(rows)
        if self.gates is None:
            for node, own in touched.items():
                block.changed[node] = self.lane.remove(self.lane.here[node], rows, own, dtype)
            for item in self.lane.above:
                change = self.lane.follow(item, block.changed, dtype)
                if change is not None:
                    block.changed[item.node] = change
        else:
            self.gates.try_removals(block, touched, dtype)
        logits = self._logits()
        change = block.changed.get(logits.node)
        if change is None:
            final = logits.x[0][None].expand(len(rows), -1, -1)
        elif change.x:
            final = change.x[0]
        else:
            assert change.out is not None
            final = logits.x[0] + change.out
        self._count(block, estimated=dtype is not None)
        return block, self.functions.normalise(final)

    def _count(self, block: Block, *, estimated: bool) -> None:
        """Adds up the work of a block."""
        if self.gates is not None:
            self.work += sum(self.tries[self.graph.inputs[row.edges[0][0]].node] for row in block.rows)
            return
        live = {item.node: item for item in (*self.lane.here.values(), *self.lane.above)}
        nodes, metric = _ESTIMATED if estimated else (1.0, 1.0)
        nodes *= sum(self.work_of(node, live[node].everywhere) for node in block.changed)
        self.work += len(block.rows) * (metric * self.metric_work + nodes)

    def work_of(self, node: Node, everywhere: bool) -> float:
        """Returns the work of a node in one try, at all positions or at the metric position."""
        cfg, rows = self.functions.cfg, len(self.lane.pos) if everywhere else len(self.lane.last)
        numbers = {"head": 4 * cfg.d_model * cfg.d_head + 2 * self.functions.length * cfg.d_head, "logits": 0}
        return _OVERHEAD + float(
            rows * numbers.get(node.kind, (3 if cfg.gated_mlp else 2) * cfg.d_model * (cfg.d_mlp or 0))
        )

    def work_left(self, visited: Bool[Tensor, "input source"], likely: Bool[Tensor, "input source"]) -> float:
        """Returns the work that is expected of all tries to come, in the unit of `work`.

        Args:
            likely: edges that are likely to be kept once they are visited.
        """
        kept, live_gates = self.present & (visited | likely), self.gates is not None
        # with live gates, the work of all tries so far is not counted as that of estimates either
        nodes, metric = (1.0, 1.0) if self.rounded_to is None or live_gates else _ESTIMATED

        def work_of(node: Node, everywhere: bool) -> float:
            return nodes * self.work_of(node, everywhere)

        return expected_work(self.graph, kept, visited, work_of, metric * self.metric_work, live_gates=live_gates)

    def accept(self, block: Block, last: int, removed: Sequence[int]) -> None:
        """Makes a row of a block the present state.

        Args:
            last: the last row whose edge is removed.
            removed: all rows whose edges are removed, `last` among them; all of them stay out in row `last`.
        """
        for r in removed:
            for to, source in block.rows[r].edges:
                self.present[to, source] = False
        self.near = block.near
        self.lane.accept(block.changed, last, single=len(block.rows) == 1)
        if self.gates is not None:
            self.gates.accept(block, last)


class _GatesOfSearch:
    """Live gates, which choose again after each removal, and the clean stream that they read.

    Args:
        end: the ablated stream at the metric position, in which their masks act.
    """

    def __init__(self, exp: Experiment, end: EndLane) -> None:
        self.graph, self.end, self.clean = exp.graph, end, end.clean
        self.functions = LocalGates(exp.model)
        self.above: list[Node] = []
        """Nodes above the present step that are live in either stream, in the order of computation."""
        self.here: list[Node] = []
        self.resid: dict[int, Float[Tensor, "pair d_model"]] = {}
        """Present residual stream that enters each layer above the present step, in the clean stream."""
        self.scores: dict[tuple[int, int], Float[Tensor, "pair unit"]] = {}
        """Present scores of the gates, by layer and kind: attention units (0) or neurons (1)."""
        self.masks: dict[tuple[int, int], Float[Tensor, "pair unit"]] = {}
        """Present masks of the same gates."""

    def enter(self, nodes: Sequence[Node]) -> set[Node]:
        """Goes down to the next step; returns the nodes that are live in it."""
        self.above = [*self.here, *self.above]
        self.clean.enter(nodes)
        self.here = [node for node in nodes if node in self.clean.here or node in self.end.here]
        return set(self.here)

    def choose_all(self) -> None:
        """Computes the clean stream and lets all gates above the present step choose."""
        self.clean.compute()
        writes = self.clean.at_last.clone()
        for item in (*self.clean.here.values(), *self.clean.above):
            if item.source >= 0:
                assert item.out is not None
                out = self.clean.write(item, self.clean.restrict_to_end(item.out))
                writes[item.source] = out - self.clean.take_last(self.clean.carried[item.source])
        lowest = max((node.layer for node in self.here if node.kind != "logits"), default=self.graph.n_layers)
        self.resid, self.scores, self.masks = {}, {}, {}
        for layer, kind in sorted({_gate_of(item.node) for item in self.end.above if item.node.kind != "logits"}):
            if layer <= lowest:
                continue
            if layer not in self.resid:
                n = self.graph.sources_before(Node("head", layer, 0))
                self.resid[layer] = self.clean.take_last(self.clean.base_at[n]) + writes[:n].sum(0)
            self.scores[layer, kind] = self.functions.scores(layer, kind, self.resid[layer])
            self.masks[layer, kind] = self.functions.select(layer, kind, self.scores[layer, kind])
        for item in self.end.above:
            if item.node.kind != "logits" and _gate_of(item.node) in self.masks:
                item.mask = self._mask_of(item.node, self.masks[_gate_of(item.node)])

    def _mask_of(self, node: Node, mask: Float[Tensor, "... unit"]) -> Float[Tensor, "... width"]:
        """Returns a node's part of the mask of its layer."""
        return mask.unflatten(-1, (self.graph.n_heads, -1))[..., node.head, :] if node.kind == "head" else mask

    def try_removals(self, block: Block, touched: Mapping[Node, list[int]], dtype: torch.dtype | None) -> None:
        """Adds to a block what its rows change in both streams.

        Args:
            touched: rows of the block by the node whose edges they remove.
        """
        clean, end = self.clean, self.end
        end.changed_below = block.clean
        for lane, changed in ((clean, block.clean), (end, block.changed)):
            for node, own in touched.items():
                if node in lane.here:
                    changed[node] = lane.remove(lane.here[node], block.rows, own, dtype)
        items: tuple[dict[Node, Live], ...] = tuple({item.node: item for item in lane.above} for lane in (clean, end))
        layer = next(iter(touched)).layer
        moved, n_moved = None, 0
        for node in self.above:
            if node.kind != "logits" and node.layer > layer:
                layer = node.layer
                new = [(n, c.out) for n, c in [*block.clean.items()][n_moved:] if c.out is not None]
                n_moved = len(block.clean)
                written = clean.sum_written({n: clean.restrict_to_end(out) for n, out in new})
                moved = written if moved is None else moved if written is None else moved + written
                if moved is not None:
                    self._choose_again(layer, moved, block)
            if node in items[0]:
                change = clean.follow(items[0][node], block.clean, dtype)
                if change is not None:
                    block.clean[node] = change
            if node in items[1]:
                again = None if node.kind == "logits" else block.masks.get(_gate_of(node))
                again = None if again is None else self._mask_of(node, again)
                change = end.follow(items[1][node], block.changed, dtype, again)
                if change is not None:
                    block.changed[node] = change
        end.changed_below = {}

    def _choose_again(self, layer: int, moved: Float[Tensor, "row pair d_model"], block: Block) -> None:
        """Adds to a block the masks of a layer, where they change with the residual stream that enters it."""
        for kind in (0, 1):
            if (layer, kind) in self.scores:
                block.moved[layer] = moved
                scores = self.scores[layer, kind] + self.functions.score_changes(layer, kind, moved)
                again = self.functions.select_again(layer, kind, scores, self.masks[layer, kind])
                if again is not None:
                    block.masks[layer, kind] = again

    def accept(self, block: Block, last: int) -> None:
        """Makes a row of a block the present state."""
        self.clean.accept(block.clean, last, single=len(block.rows) == 1)
        for layer, moved in block.moved.items():
            self.resid[layer] = self.resid[layer] + moved[last]
        for layer, kind in self.scores:
            if layer in block.moved:
                self.scores[layer, kind] = self.functions.scores(layer, kind, self.resid[layer])
        for gate, mask in block.masks.items():
            self.masks[gate] = mask[last].clone()


def _gate_of(node: Node) -> tuple[int, int]:
    """Returns layer and kind of the gate of a head or MLP."""
    return node.layer, 0 if node.kind == "head" else 1
