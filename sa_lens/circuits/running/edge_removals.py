"""The metric after each of many removals of edges; only what a removal can change is computed again.

Edges are visited from the last layer to the first, and every input is

    base + sum over present edges of (what the source writes - what an absent edge carries)

where *present* means kept or not yet visited. Three facts make this cheap and exact:

- below the layer that is visited every edge is present, so all sources there write what they write on the clean prompt;
- a node without a path of present edges to the logits has no effect, and a node that only feeds the metric position
  (no key or value above it) has an effect at that position only;
- a removal at one node affects only the nodes above it to which present edges lead.

These nodes are computed for a whole block of rows at once; each row is a removal in addition to those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.expected_work import expected_work
from sa_lens.circuits.running.recorded_passes import Outputs, outputs, residual_streams, write_to_stream
from sa_lens.circuits.running.removal_costs import Near, cost_of
from sa_lens.circuits.running.removal_state import Block, Changed, Live, Row, versions_by_row
from sa_lens.core.nodes import InsideMLP
from sa_lens.core.products import faster_dtype, product

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
        self.graph, self.functions, batches = exp.graph, exp.nodes, exp.passes
        self.present = present.clone()
        self.last = torch.cat([batch.prompts.last for batch in batches])
        """Metric position of each prompt. Pairs are ordered by length."""
        first, length = torch.cat([batch.first for batch in batches]), self.functions.length
        places = torch.arange(length, device=self.last.device)
        pair, self.pos = ((places >= first[:, None]) & (places <= self.last[:, None])).nonzero(as_tuple=True)
        self.slots = pair * length + self.pos
        """Place of each row among the positions of all prompts."""
        before_end = self.pos < self.last[pair]
        self.ends = (~before_end).nonzero()[:, 0]
        """Row of the metric position of each prompt."""
        rows = {"earlier": before_end.nonzero()[:, 0], exp.stream: self.ends}

        def by_source(by_batch: Sequence[Outputs]) -> Float[Tensor, "source row d_model"]:
            x = batches[0].prompts.embed.new_zeros(len(self.graph.sources), len(self.pos), self.functions.cfg.d_model)
            for lane, of_lane in rows.items():
                for source, parts in enumerate(zip(*(outs[lane] for outs in by_batch), strict=True)):  # type: ignore[index]
                    kept = [b.changing if lane == "earlier" else slice(None) for b in batches]
                    out = torch.cat([part[k] for part, k in zip(parts, kept, strict=True)])
                    x[source, of_lane] = write_to_stream(self.graph, self.functions, source, out)
            return x

        wrote = by_source([outputs(batch.prompts, batch.clean) for batch in batches])
        self.carried = by_source([batch.carried for batch in batches])
        self.before = [
            [torch.cat(parts, 1) for parts in zip(*layer, strict=True)]
            for layer in zip(*(batch.clean.keys_and_values for batch in batches), strict=True)
        ]
        """Keys and values `[head, pair, pos, d_head]` of the clean prompts, by layer, for positions without a row."""
        self.masks: list[list[Tensor | None]] = [[None, None] for _ in range(self.graph.n_layers)]
        """Masks of attention units and neurons at the metric position, by layer; None in the clean stream."""
        if exp.stream == "ablated":
            for layer, kinds in enumerate(self.masks):
                for kind in range(1 if self.graph.attn_only else 2):
                    kinds[kind] = torch.cat([batch.clean.masks[layer][kind] for batch in batches])  # type: ignore[misc]
        self.full_at, self.base_at = (
            residual_streams(self.graph, list(x), self.functions.b_O) for x in (wrote, self.carried)
        )
        self.difference = wrote.sub_(self.carried)
        self.at_last = self._take_last(self.difference)
        order = torch.cat([batch.rows for batch in batches])
        clean = self.functions.normalise(self.final_clean())
        self.metric_work = float(self.functions.W_U.numel() * len(self.last))
        self.cost = cost_of(exp.metric, self.functions, exp.pairs.subset(order), clean)
        self.above: list[Live] = []
        """Live nodes above the present step, in the order of computation."""
        self.here: dict[Node, Live] = {}
        """Live nodes of the present step."""
        self.by_source: dict[int, Live] = {}
        self.work = 0.0
        """Work of all tries so far, about one multiplication per unit."""
        self.rounded_to = faster_dtype(self.difference) if self.functions.cfg.d_model >= WIDE else None
        """Type of the products of estimates; None if estimates would not be faster."""
        self.near: Near | None = None
        """Present state of the metric; None until an estimate needs it."""

    # ------------------------------------------------------------------------------------------------------- steps

    def enter(self, places: Iterable[tuple[int, int]]) -> set[Node]:
        """Goes down to the next step, whose edges (input, source) are given; returns its live nodes.

        Their edges are all present, except those that an interrupted search removed before it was resumed. The present
        values of all live nodes are computed from scratch, the lowest first, so that rounding does not accumulate.
        """
        self.above = [*self.here.values(), *self.above]
        nodes = sorted({self.graph.inputs[to].node for to, _ in places}, key=lambda node: node[1:])
        live = [item for node in nodes if (item := self._live_node(node)) is not None]
        self.here = {item.node: item for item in live}
        self.by_source = {item.source: item for item in (*live, *self.above) if item.source >= 0}
        for item in live:
            entering = self.full_at[self.graph.sources_before(item.node)]
            item.x = [self._restrict(item, i, entering) - self._removed_part(item, i) for i in range(len(item.inputs))]
            self._compute(item)
        for item in self.above:
            entering = self.base_at[self.graph.sources_before(item.node)]
            for i, to in enumerate(item.inputs):
                x = self._restrict(item, i, entering).clone()
                for source in self.present[to].nonzero()[:, 0].tolist():
                    x += self._contribution(source, item, i)
                item.x[i] = x
            self._compute(item)
        self.near = None
        return set(self.here)

    def drop(self, places: Sequence[tuple[int, int]]) -> None:
        """Removes edges (input, source) into nodes that are not live."""
        if places:
            to, source = torch.tensor(places).T
            self.present[to, source] = False

    def _live_node(self, node: Node) -> Live | None:
        inputs = self.graph.inputs_of[node]
        if node.kind == "logits":
            return Live(node, -1, False, inputs)
        source = self.graph.source_index[node]
        reads = [(item, i) for item in self.above for i, to in enumerate(item.inputs) if self.present[to, source]]
        if not reads:
            return None
        everywhere = any(item.everywhere or (item.node.kind == "head" and i > 0) for item, i in reads)
        return Live(node, source, everywhere, inputs, mask=self._mask(node, everywhere))

    # ------------------------------------------------------------------------------------------------------ values

    def _take_last(self, x: Float[Tensor, "... row width"]) -> Float[Tensor, "... pair width"]:
        return x.index_select(-2, self.ends)

    def _acts_everywhere(self, item: Live, i: int) -> bool:
        """Returns whether input i has an effect at all positions."""
        return item.everywhere or (item.node.kind == "head" and i > 0)

    def _restrict(self, item: Live, i: int, x: Tensor) -> Tensor:
        """Returns `x` at the positions at which input i has an effect."""
        return x if self._acts_everywhere(item, i) or x.shape[-2] == len(self.ends) else self._take_last(x)

    def _differences(self, item: Live, i: int) -> Float[Tensor, "source row d_model"]:
        return self.difference if self._acts_everywhere(item, i) else self.at_last

    def _removed_part(self, item: Live, i: int) -> Float[Tensor, "row d_model"]:
        """Returns what removed edges took from an input of a node of the present step; 0 if none is removed."""
        to = item.inputs[i]
        removed = self.graph.exists[to] & ~self.present[to]
        return self._differences(item, i)[removed.to(self.difference.device)].sum(0)

    def _contribution(self, source: int, item: Live, i: int) -> Float[Tensor, "row d_model"]:
        """Returns what a present edge adds to the base of an input."""
        sender = self.by_source.get(source)
        if sender is None:
            return self._differences(item, i)[source]
        assert sender.out is not None
        out = self._restrict(item, i, sender.out)
        written = self._write(sender, out)
        return written - self._restrict(item, i, self.carried[source])

    def _write(self, item: Live, out: Tensor) -> Float[Tensor, "... pos d_model"]:
        """Returns what values (or changes) of `out` add to the residual stream."""
        if item.node.kind == "head":
            return product(out, self.functions.W_O[item.node.layer][item.node.head])
        return out

    def _compute(self, item: Live) -> None:
        """Computes the present values of a node from its inputs."""
        if item.node.kind == "head":
            item.qkv = [self._project(item, i, item.x[i]) for i in range(3)]
            item.out = self._z(item, item.qkv)
        elif item.node.kind == "mlp":
            item.inside = None
            item.out = self.functions.mlp(item.node.layer, item.x[0], item.mask)

    def _project(self, item: Live, port: int, x: Tensor) -> Tensor:
        position = self.pos if self._acts_everywhere(item, port) else self.last
        return self.functions.project(item.node.layer, port, item.node.head, x, position)

    def _z(self, item: Live, qkv: Sequence[Tensor]) -> Tensor:
        layer, head = item.node.layer, item.node.head
        q, k, v = qkv
        k, v = (self._pad(known[head], x) for known, x in zip(self.before[layer], (k, v), strict=True))
        if item.everywhere:
            # queries at positions without a row are not used
            z = self.functions.attend(layer, self._pad(q.new_zeros(1, 1, q.shape[-1]), q), k, v)
            z = z.flatten(-3, -2).index_select(-2, self.slots)
        else:
            z = self.functions.attend(layer, q[..., None, :], k, v, self.last)[..., 0, :]
        return z if item.mask is None else z * item.mask

    def _pad(
        self, known: Float[Tensor, "pair pos d_head"], x: Float[Tensor, "... row d_head"]
    ) -> Float[Tensor, "... pair pos d_head"]:
        """Returns queries, keys or values at all positions of all prompts, of which those with a row are given."""
        pairs, length = len(self.last), self.functions.length
        padded = known.expand(*x.shape[:-2], pairs, length, -1).flatten(-3, -2)
        return padded.index_copy(-2, self.slots, x).unflatten(-2, (pairs, length))

    def _mlp(
        self, item: Live, x: Float[Tensor, "any row d_model"], dtype: torch.dtype | None
    ) -> tuple[Float[Tensor, "any row d_model"], InsideMLP | None]:
        """Returns how an MLP's output changes if its input becomes `x`, and the values inside it for a single `x`.

        Args:
            dtype: type of the products of an estimate; None for the exact change.
        """
        assert item.out is not None
        layer, f = item.node.layer, self.functions
        if dtype is not None:
            item.inside = item.inside or f.inside_mlp(layer, item.x[0])
            return f.mlp_change(layer, item.inside, x, item.mask, dtype), None
        if len(x) > 1:
            return f.mlp(layer, x, item.mask).sub_(item.out), None
        inside = f.inside_mlp(layer, x[0])
        post = inside.post if item.mask is None else inside.post * item.mask
        return f.mlp_output(layer, post).sub_(item.out)[None], inside

    def _mask(self, node: Node, everywhere: bool) -> Float[Tensor, "pair pos width"] | None:
        mask = self.masks[node.layer][0 if node.kind == "head" else 1]
        if mask is None:
            return None
        if node.kind == "head":
            mask = mask[:, node.head]
        if not everywhere:
            return mask
        full = mask.new_ones(len(self.pos), mask.shape[-1])
        full[self.ends] = mask
        return full

    # ------------------------------------------------------------------------------------------------------- blocks

    def value(self) -> float:
        """Returns the metric of the full graph."""
        return self.cost.near(self.functions.normalise(self.final_clean())).cost

    def final_clean(self) -> Float[Tensor, "pair d_model"]:
        """Returns the final residual stream of the unedited clean prompts at the metric position."""
        return self._take_last(self.full_at[len(self.graph.sources)])

    @property
    def largest_block(self) -> int:
        """Largest number of rows in a block, limited by memory."""
        return max(4, min(16, _BLOCK // self.difference[0].numel()))

    def _logits(self) -> Live:
        return next(item for item in (*self.here.values(), *self.above) if item.node.kind == "logits")

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
        block = Block(rows, {})
        for node, own in touched.items():
            block.changed[node] = self._remove(self.here[node], rows, own, dtype)
        for item in self.above:
            change = self._follow(item, block.changed, dtype)
            if change is not None:
                block.changed[item.node] = change
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
        live = {item.node: item for item in (*self.here.values(), *self.above)}
        nodes, metric = _ESTIMATED if estimated else (1.0, 1.0)
        nodes *= sum(self.work_of(node, live[node].everywhere) for node in block.changed)
        self.work += len(block.rows) * (metric * self.metric_work + nodes)

    def work_of(self, node: Node, everywhere: bool) -> float:
        """Returns the work of a node in one try, at all positions or at the metric position."""
        cfg, rows = self.functions.cfg, len(self.pos) if everywhere else len(self.last)
        numbers = {"head": 4 * cfg.d_model * cfg.d_head + 2 * self.functions.length * cfg.d_head, "logits": 0}
        return _OVERHEAD + float(
            rows * numbers.get(node.kind, (3 if cfg.gated_mlp else 2) * cfg.d_model * (cfg.d_mlp or 0))
        )

    def work_left(self, visited: Bool[Tensor, "input source"], likely: Bool[Tensor, "input source"]) -> float:
        """Returns the work that is expected of all tries to come, in the unit of `work`.

        Args:
            likely: edges that are likely to be kept once they are visited.
        """
        kept = self.present & (visited | likely)
        nodes, metric = (1.0, 1.0) if self.rounded_to is None else _ESTIMATED

        def work_of(node: Node, everywhere: bool) -> float:
            return nodes * self.work_of(node, everywhere)

        return expected_work(self.graph, kept, visited, work_of, metric * self.metric_work)

    def _remove(self, item: Live, rows: Sequence[Row], own: list[int], dtype: torch.dtype | None) -> Changed:
        """Returns what removals of a node's own edges change at this node."""
        result = Changed.nothing()
        for i, to in enumerate(item.inputs):
            mine = {r: sources for r in own if (sources := [source for t, source in rows[r].edges if t == to])}
            if not mine:
                continue
            result.x[i] = self._versions(item, i, list(mine.values()), [rows[r].stays_out for r in mine])
            result.version[i] = versions_by_row(rows, list(mine))
            if item.node.kind == "head":
                result.qkv[i] = self._project(item, i, result.x[i])
        if item.node.kind == "logits":
            return result
        assert item.out is not None
        if item.node.kind == "head":
            qkv = [self._pick(result, i, item.qkv[i], own) for i in range(3)]
            change = self._z(item, qkv).sub_(item.out)
        else:
            change, inside = self._mlp(item, result.x[0], dtype)
            result = result._replace(inside=inside)
        if len(own) < len(rows):
            change = torch.cat([torch.zeros_like(change[:1]), change])[versions_by_row(rows, own)]
        return result._replace(out=change)

    def _versions(
        self, item: Live, i: int, removed: list[list[int]], stays_out: list[bool]
    ) -> Float[Tensor, "version row d_model"]:
        """Returns an input after each removal of some of its sources, in addition to those before it that stay out."""
        x, differences = item.x[i], self._differences(item, i)
        sources = [source for of_row in removed for source in of_row]
        taken = torch.zeros(len(removed), len(sources), dtype=x.dtype)
        first = 0
        for row, of_row in enumerate(removed):
            last = first + len(of_row)
            taken[row : None if stays_out[row] else row + 1, first:last] = 1
            first = last
        taken = taken.to(x.device)
        if sources == list(range(sources[0], sources[0] - len(sources), -1)):
            sent, taken = differences[sources[-1] : sources[0] + 1], taken.flip(1)
        else:
            sent = differences[torch.tensor(sources, device=x.device)]
        return torch.addmm(x.reshape(1, -1), taken, sent.flatten(1), alpha=-1).view(-1, *x.shape)

    def _pick(self, change: Changed, i: int, present: Tensor, own: list[int]) -> Tensor:
        """Returns the query, key or value in each of a node's own rows."""
        if i not in change.qkv:
            return present
        index = [change.version[i][r] for r in own]
        if index == list(range(1, len(index) + 1)):
            return change.qkv[i]
        return torch.cat([present[None], change.qkv[i]])[torch.tensor(index, device=present.device)]

    def _follow(self, item: Live, changed: dict[Node, Changed], dtype: torch.dtype | None) -> Changed | None:
        """Returns what the changes so far do to a node above, or None if none of them reaches it."""
        result = Changed.nothing()
        inputs: dict[int, Tensor] = {}
        for i in range(len(item.inputs)):
            arriving = self._incoming_change(item, i, changed, slice(None))
            if arriving is not None:
                inputs[i] = arriving
        if not inputs:
            return None
        if item.node.kind == "logits":
            return result._replace(out=inputs[0])
        assert item.out is not None
        if item.node.kind == "mlp":
            change, inside = self._mlp(item, inputs[0].add_(item.x[0]), dtype)
            return result._replace(out=change, inside=inside)
        for i, x in inputs.items():
            result.qkv[i] = self._project(item, i, x.add_(item.x[i]))
        qkv = [result.qkv.get(i, item.qkv[i]) for i in range(3)]
        return result._replace(out=self._z(item, qkv).sub_(item.out))

    def _incoming_change(
        self, item: Live, i: int, changed: dict[Node, Changed], rows: slice
    ) -> Float[Tensor, "block row d_model"] | None:
        """Returns the change of an input through present edges, which the caller may overwrite, or None without any."""
        present = self.present[item.inputs[i]]
        z, W, total = [], [], None
        for node, change in changed.items():
            source = self.graph.source_index.get(node)
            if source is None or not present[source] or change.out is None:
                continue
            out = self._restrict(item, i, change.out[rows])
            if node.kind == "head":
                z.append(out)
                W.append(self.functions.W_O[node.layer][node.head])
            else:
                total = out.clone() if total is None else total.add_(out)
        if z:
            by_heads = product(z[0] if len(z) == 1 else torch.cat(z, -1), W[0] if len(W) == 1 else torch.cat(W))
            total = by_heads if total is None else total.add_(by_heads)
        return total

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
        row = slice(last, last + 1)
        updates: list[tuple[Live, int, Tensor]] = []
        for item in (*self.here.values(), *self.above):
            change = block.changed.get(item.node)
            if change is None:
                continue
            for i in range(len(item.inputs)):
                if i in change.x:
                    version = change.version[i][last]
                    if version:
                        updates.append((item, i, change.x[i][version - 1]))
                elif item.node not in self.here:
                    arriving = self._incoming_change(item, i, block.changed, row)
                    if arriving is not None:
                        updates.append((item, i, item.x[i] + arriving[0]))
            for i, values in change.qkv.items():
                version = change.version[i][last] if i in change.version else last + 1
                if version:
                    item.qkv[i] = values[version - 1].clone()
            if change.out is not None and item.node.kind != "logits":
                assert item.out is not None
                item.out = item.out + change.out[last]
                item.inside = change.inside if len(block.rows) == 1 else None
        for item, i, x in updates:
            item.x[i] = x.clone()
