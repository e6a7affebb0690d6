"""The metric after each of many removals of edges, by runs of whole circuits: for models, masks and orders for which a
removal changes more than `edge_removals` recomputes.

Runs of nodes (`many_circuits`) still share all that removals of a block leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.running.many_circuits import CircuitLogits
from sa_lens.circuits.running.removal_costs import cost_of
from sa_lens.circuits.running.removal_state import Block, Row


class WholeRuns:
    """Computes the metric after removals by running the circuit that each leaves.

    Args:
        present: True for edges that are kept or not yet visited.
    """

    def __init__(self, exp: Experiment, present: Bool[Tensor, "input source"]) -> None:
        self.exp, self.present = exp, present.clone()
        self.circuits = CircuitLogits(exp)
        self.work = 0.0
        """Work of all tries so far: the number of layers that each runs again, and one for the metric."""
        by_nodes = exp.why_not_by_nodes is None
        self.largest_block = 16 if by_nodes else 1
        """Largest number of rows in a block; runs under hooks share nothing."""
        if by_nodes:
            passes, normalise = exp.passes, exp.nodes.normalise
            pairs = exp.pairs.subset(torch.cat([batch.rows for batch in passes]))
            clean = normalise(torch.cat([batch.clean.final[exp.stream] for batch in passes]))
            cost = cost_of(exp.metric, exp.nodes, pairs, clean)
            self._costs = lambda masks: cost(normalise(torch.stack(self.circuits.finals(masks)))).tolist()
        else:
            self._costs = lambda masks: [exp.metric.sign * self.circuits.value(mask) for mask in masks]

    def value(self) -> float:
        """Returns the metric of the full graph; larger is worse."""
        return float(self._costs([self.exp.graph.exists])[0])

    def try_removals(self, rows: Sequence[Row]) -> Block:
        """Returns the metric after each removal of a block, in addition to the earlier rows that stay out."""
        masks, out = [], self.present.clone()
        for row in rows:
            mask = out.clone()
            for to, source in row.edges:
                mask[to, source] = False
            masks.append(mask)
            if row.stays_out:
                out = mask
        self.work += sum(self._layers(row.edges[0][0]) for row in rows)
        return Block(rows, costs=self._costs(masks))

    def _layers(self, to: int) -> int:
        node, n = self.exp.graph.inputs[to].node, self.exp.graph.n_layers
        return 1 if node.kind == "logits" else 1 + n - node.layer

    def work_left(self, visited: Bool[Tensor, "input source"], likely: Bool[Tensor, "input source"]) -> float:
        """Returns the work of all tries to come, in the unit of `work`; every edge is tried, likely to stay or not."""
        left = (self.exp.graph.exists & ~visited).sum(1).tolist()
        return float(sum(n * self._layers(to) for to, n in enumerate(left)))

    def accept(self, block: Block, last: int, removed: Sequence[int]) -> None:
        """Makes a row of a block the present state; see `Recomputation.accept`."""
        for r in removed:
            for to, source in block.rows[r].edges:
                self.present[to, source] = False
        self.circuits.keep_only(self.present)
