"""One stream of a search for circuits: present values of its live nodes, and what removals of edges change at them.

`edge_removals` puts together what the streams give. In the clean stream, and with frozen masks in the ablated one, one
lane holds all positions at which values can change, up to the metric position. Live gates need two lanes: they read the
clean stream, and their masks act at the metric position of the ablated stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.recorded_passes import Outputs, outputs, residual_streams, write_to_stream
from sa_lens.circuits.running.removal_state import Changed, Live, Row, versions_by_row
from sa_lens.core.last_position import Lane
from sa_lens.core.nodes import InsideMLP
from sa_lens.core.products import product


class RemovalLane:
    """Present values of the live nodes of a stream, and what removals change at them.

    Args:
        present: True for edges that are kept or not yet visited; shared with the other lanes of a search.
        lanes: lanes of the passes whose positions it holds; the last one is the metric position of a stream.
    """

    def __init__(self, exp: Experiment, present: Bool[Tensor, "input source"], lanes: Sequence[Lane]) -> None:
        self.graph, self.functions, batches = exp.graph, exp.nodes, exp.passes
        self.present = present
        self.last = torch.cat([batch.prompts.last for batch in batches])
        """Metric position of each prompt. Pairs are ordered by length."""
        first, length = torch.cat([batch.first for batch in batches]), self.functions.length
        places = torch.arange(length, device=self.last.device)
        first = first if "earlier" in lanes else self.last
        pair, self.pos = ((places >= first[:, None]) & (places <= self.last[:, None])).nonzero(as_tuple=True)
        self.slots = pair * length + self.pos
        """Place of each row among the positions of all prompts."""
        before_end = self.pos < self.last[pair]
        self.ends = (~before_end).nonzero()[:, 0]
        """Row of the metric position of each prompt."""
        rows = {lane: before_end.nonzero()[:, 0] if lane == "earlier" else self.ends for lane in lanes}

        def by_source(by_batch: Sequence[Outputs]) -> Float[Tensor, "source row d_model"]:
            x = batches[0].prompts.embed.new_zeros(len(self.graph.sources), len(self.pos), self.functions.cfg.d_model)
            for lane, of_lane in rows.items():
                for source, parts in enumerate(zip(*(outs[lane] for outs in by_batch), strict=True)):
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
        if "ablated" in lanes:
            for layer, kinds in enumerate(self.masks):
                for kind in range(1 if self.graph.attn_only else 2):
                    kinds[kind] = torch.cat([batch.clean.masks[layer][kind] for batch in batches])  # type: ignore[misc]
        self.full_at, self.base_at = (
            residual_streams(self.graph, list(x), self.functions.b_O) for x in (wrote, self.carried)
        )
        self.difference = wrote.sub_(self.carried)
        self.at_last = self.take_last(self.difference)
        self.above: list[Live] = []
        """Live nodes above the present step, in the order of computation."""
        self.here: dict[Node, Live] = {}
        """Live nodes of the present step."""
        self.by_source: dict[int, Live] = {}

    # ------------------------------------------------------------------------------------------------------- steps

    def enter(self, nodes: Iterable[Node]) -> None:
        """Goes down to the next step, whose nodes are given, and determines which of them are live."""
        self.above = [*self.here.values(), *self.above]
        live = [item for node in nodes if (item := self._live_node(node)) is not None]
        self.here = {item.node: item for item in live}
        self.by_source = {item.source: item for item in (*live, *self.above) if item.source >= 0}

    def compute(self) -> None:
        """Computes the present values of all live nodes from scratch, the lowest first."""
        for item in self.here.values():
            entering = self.full_at[self.graph.sources_before(item.node)]
            item.x = [self._restrict(item, i, entering) - self._removed_part(item, i) for i in range(len(item.inputs))]
            self._compute(item)
        for item in self.above:
            entering = self.base_at[self.graph.sources_before(item.node)]
            item.x = [self._restrict(item, i, entering) for i in range(len(item.inputs))]
            for i, to in enumerate(item.inputs):
                sources = self.present[to].nonzero()[:, 0].tolist()
                if sources:
                    item.x[i] = sum((self._contribution(source, item, i) for source in sources), start=item.x[i])
            self._compute(item)

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

    def take_last(self, x: Float[Tensor, "... row width"]) -> Float[Tensor, "... pair width"]:
        """Returns the metric position of values at all positions."""
        return x.index_select(-2, self.ends)

    def restrict_to_end(self, x: Float[Tensor, "... any width"]) -> Float[Tensor, "... pair width"]:
        """Returns the metric position of values at all positions or at this one alone."""
        return x if x.shape[-2] == len(self.ends) else self.take_last(x)

    def _acts_everywhere(self, item: Live, i: int) -> bool:
        """Returns whether input i has an effect at all positions."""
        return item.everywhere or (item.node.kind == "head" and i > 0)

    def _restrict(self, item: Live, i: int, x: Tensor) -> Tensor:
        """Returns `x` at the positions at which input i has an effect."""
        return x if self._acts_everywhere(item, i) else self.restrict_to_end(x)

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
        written = self.write(sender, out)
        return written - self._restrict(item, i, self.carried[source])

    def write(self, item: Live, out: Tensor) -> Float[Tensor, "... pos d_model"]:
        """Returns what values (or changes) of `out` add to the residual stream."""
        if item.node.kind == "head":
            return product(out, self.functions.W_O[item.node.layer][item.node.head])
        return out

    def _compute(self, item: Live) -> None:
        """Computes the present values of a node from its inputs."""
        if item.node.kind == "head":
            item.qkv = [self._project(item, i, item.x[i]) for i in range(3)]
            item.out = self._z(item, item.qkv, item.mask)
        elif item.node.kind == "mlp":
            item.inside = None
            item.out = self.functions.mlp(item.node.layer, item.x[0], item.mask)

    def _project(self, item: Live, port: int, x: Tensor) -> Tensor:
        position = self.pos if self._acts_everywhere(item, port) else self.last
        return self.functions.project(item.node.layer, port, item.node.head, x, position)

    def _z(
        self, item: Live, qkv: Sequence[Tensor], mask: Tensor | None, own: list[int] | None = None
    ) -> Float[Tensor, "... row d_head"]:
        """Returns a head's units from its queries, keys and values.

        Args:
            own: the rows of a block that these are of, if they are removals of the head's own edges.
        """
        layer, head = item.node.layer, item.node.head
        q, k, v = qkv
        k, v = (self._pad(known[head], x) for known, x in zip(self.before[layer], (k, v), strict=True))
        if item.everywhere:
            # queries at positions without a row are not used
            z = self.functions.attend(layer, self._pad(q.new_zeros(1, 1, q.shape[-1]), q), k, v)
            z = z.flatten(-3, -2).index_select(-2, self.slots)
        else:
            z = self.functions.attend(layer, q[..., None, :], k, v, self.last)[..., 0, :]
        return z if mask is None else z * mask

    def _pad(
        self, known: Float[Tensor, "... pair pos d_head"], x: Float[Tensor, "... row d_head"]
    ) -> Float[Tensor, "... pair pos d_head"]:
        """Returns queries, keys or values at all positions of all prompts, of which those with a row are given."""
        pairs, length = len(self.last), self.functions.length
        several = torch.broadcast_shapes(known.shape[:-3], x.shape[:-2])
        padded = known.expand(*several, pairs, length, -1).flatten(-3, -2)
        return padded.index_copy(-2, self.slots, x.expand(*several, -1, -1)).unflatten(-2, (pairs, length))

    def _mlp(
        self, item: Live, x: Float[Tensor, "any row d_model"] | None, again: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Float[Tensor, "any row d_model"], InsideMLP | None]:
        """Returns how an MLP's output changes, and the values inside it if this is a single change.

        Args:
            x: its input after each change; None: as it is.
            again: its mask after each change; None: as it is.
            dtype: type of the products of an estimate; None for the exact change.
        """
        assert item.out is not None
        layer, f = item.node.layer, self.functions
        mask = item.mask if again is None else again
        if dtype is not None:
            item.inside = item.inside or f.inside_mlp(layer, item.x[0])
            always = self.ends if item.everywhere else None
            return f.mlp_change(layer, item.inside, x, (item.mask, mask), dtype, always), None
        if x is None:
            inside = item.inside = item.inside or f.inside_mlp(layer, item.x[0])
        elif len(x) == 1:
            inside = f.inside_mlp(layer, x[0])
        else:
            return f.mlp(layer, x, mask).sub_(item.out), None
        post = inside.post if mask is None else inside.post * mask
        change = f.mlp_output(layer, post).sub_(item.out).view(-1, *item.out.shape)
        return change, inside if len(change) == 1 else None

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

    # ---------------------------------------------------------------------------------------------------- removals

    def remove(self, item: Live, rows: Sequence[Row], own: list[int], dtype: torch.dtype | None) -> Changed:
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
            change = self._z(item, qkv, item.mask, own).sub_(item.out)
        else:
            change, inside = self._mlp(item, result.x[0], None, dtype)
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

    def follow(
        self, item: Live, changed: dict[Node, Changed], dtype: torch.dtype | None, again: Tensor | None = None
    ) -> Changed | None:
        """Returns what the changes so far do to a node above, or None if none of them reaches it.

        Args:
            again: masks that its layer's gate chooses after each removal; None: as they are.
        """
        result = Changed.nothing()
        inputs: dict[int, Tensor] = {}
        for i in range(len(item.inputs)):
            arriving = self._incoming_change(item, i, changed, slice(None))
            if arriving is not None:
                inputs[i] = arriving
        if not inputs and again is None and not self._is_reached(item):
            return None
        if item.node.kind == "logits":
            return result._replace(out=inputs[0])
        assert item.out is not None
        if item.node.kind == "mlp":
            change, inside = self._mlp(item, inputs[0].add_(item.x[0]) if inputs else None, again, dtype)
            return result._replace(out=change, inside=inside, mask=again)
        for i, x in inputs.items():
            result.qkv[i] = self._project(item, i, x.add_(item.x[i]))
        qkv = [result.qkv.get(i, item.qkv[i]) for i in range(3)]
        change = self._z(item, qkv, item.mask if again is None else again).sub_(item.out)
        return result._replace(out=change, mask=again)

    def _is_reached(self, item: Live) -> bool:
        """Returns whether a node changes although none of its inputs does."""
        return False

    def _incoming_change(
        self, item: Live, i: int, changed: Mapping[Node, Changed], rows: slice
    ) -> Float[Tensor, "block row d_model"] | None:
        """Returns the change of an input through present edges, which the caller may overwrite, or None without any."""
        present = self.present[item.inputs[i]]
        outs = {}
        for node, change in changed.items():
            source = self.graph.source_index.get(node)
            if source is not None and present[source] and change.out is not None:
                outs[node] = self._restrict(item, i, change.out[rows])
        return self.sum_written(outs)

    def sum_written(self, outs: Mapping[Node, Tensor]) -> Float[Tensor, "block row d_model"] | None:
        """Returns what changes of nodes add to the residual stream; None without any."""
        z, W, total = [], [], None
        for node, out in outs.items():
            if node.kind == "head":
                z.append(out)
                W.append(self.functions.W_O[node.layer][node.head])
            else:
                total = out.clone() if total is None else total.add_(out)
        if z:
            by_heads = product(z[0] if len(z) == 1 else torch.cat(z, -1), W[0] if len(W) == 1 else torch.cat(W))
            total = by_heads if total is None else total.add_(by_heads)
        return total

    def accept(self, changed: Mapping[Node, Changed], last: int, *, single: bool) -> None:
        """Makes what a row of a block changes the present state.

        Args:
            single: whether it is the only row.
        """
        row = slice(last, last + 1)
        updates: list[tuple[Live, int, Tensor]] = []
        for item in (*self.here.values(), *self.above):
            change = changed.get(item.node)
            if change is None:
                continue
            for i in range(len(item.inputs)):
                if i in change.x:
                    version = change.version[i][last]
                    if version:
                        updates.append((item, i, change.x[i][version - 1]))
                elif item.node not in self.here:
                    arriving = self._incoming_change(item, i, changed, row)
                    if arriving is not None:
                        updates.append((item, i, item.x[i] + arriving[0]))
            for i, values in change.qkv.items():
                version = change.version[i][last] if i in change.version else last + 1
                if version:
                    item.qkv[i] = values[version - 1].clone()
            if change.out is not None and item.node.kind != "logits":
                assert item.out is not None
                item.out = item.out + change.out[last]
                item.inside = change.inside if single else None
            if change.mask is not None:
                item.mask = change.mask[last].clone()
        for item, i, x in updates:
            item.x[i] = x.clone()


class EndLane(RemovalLane):
    """The metric position of the ablated stream under live gates; keys and values before it are clean."""

    def __init__(self, exp: Experiment, present: Bool[Tensor, "input source"]) -> None:
        super().__init__(exp, present, ("ablated",))
        self.clean: GateLane = GateLane(exp, present, self)
        self.changed_below: Mapping[Node, Changed] = {}
        """What the present block changes in the clean lane."""

    def _is_reached(self, item: Live) -> bool:
        change = self.changed_below.get(item.node)
        return change is not None and not change.qkv.keys().isdisjoint((1, 2))

    def _z(
        self, item: Live, qkv: Sequence[Tensor], mask: Tensor | None, own: list[int] | None = None
    ) -> Float[Tensor, "... row d_head"]:
        layer, head = item.node.layer, item.node.head
        below, change = self.clean.by_source[item.source], self.changed_below.get(item.node)
        padded = []
        for i in (1, 2):
            earlier = below.qkv[i]
            if change is not None and i in change.qkv:
                earlier = change.qkv[i] if own is None else self._pick(change, i, earlier, own)
            padded.append(self._pad(self.clean._pad(self.before[layer][i - 1][head], earlier), qkv[i]))
        z = self.functions.attend(layer, qkv[0][..., None, :], padded[0], padded[1], self.last)[..., 0, :]
        return z if mask is None else z * mask


class GateLane(RemovalLane):
    """The clean stream that live gates read, at all positions up to the metric position.

    A node is live if a gate above it reads the residual stream that it writes to, or if the keys and values of a head
    of the ablated stream depend on it.

    Args:
        end: the lane of the ablated stream.
    """

    def __init__(self, exp: Experiment, present: Bool[Tensor, "input source"], end: EndLane) -> None:
        super().__init__(exp, present, ("earlier", "clean"))
        self.end = end

    def _live_node(self, node: Node) -> Live | None:
        live = super()._live_node(node)
        if live is None and (node in self.end.here or any(item.node.layer > node.layer for item in self.end.above)):
            live = Live(node, self.graph.source_index[node], False, self.graph.inputs_of[node])
        return live
