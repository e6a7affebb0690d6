"""Runs of many circuits on the same prompts; a node is computed once for each different input that it gets.

A run of a circuit is a pass in which every input is

    base + sum over the circuit's edges of (what the source writes in this run - what an absent edge carries)

where `base` is what absent edges carry from all sources, plus biases. So what a node writes depends only on the edges
below it. A *version* of a node is what it writes for one choice of these edges. Circuits that agree below a node share
its version, and a version is computed only if a path leads from it to the logits of a circuit that is asked for.

A pass is divided into lanes. `earlier` holds the positions before the metric position, which are the same in both
streams, without those at which nothing can change because both prompts still agree. `clean` and `ablated` are the
metric position in each stream. With live gates that read the clean stream a pass has all three lanes.

`CircuitRunner`, which runs whole passes under hooks, is the definition. It also runs the models for which both might
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import PORTS, Node
from sa_lens.circuits.running.circuit_by_hooks import CircuitRunner
from sa_lens.circuits.running.recorded_passes import PassesOfPairs, residual_streams, write_to_stream
from sa_lens.core.last_position import Lane, Prompts
from sa_lens.core.nodes import gate_masks

MEMORY = 2**28
"""Largest size in bytes of the versions that are kept."""
_BLOCK = 2**21
"""Largest number of entries in the inputs that are computed together."""


class CircuitLogits:
    """Computes logits of circuits of an experiment, by versions if the model allows it, otherwise by whole passes."""

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.graph = exp, exp.graph
        self._run: CircuitRunner | None = None
        self._parts: list[tuple[Tensor, _Versions]] = []
        if exp.why_not_by_nodes is not None:
            self._run = CircuitRunner(exp)
            return
        with torch.no_grad():
            self._parts = [(batch.rows, _Versions(exp, batch)) for batch in exp.passes]

    def __call__(self, masks: Sequence[Bool[Tensor, "input source"]]) -> list[Float[Tensor, "pair d_vocab"]]:
        """Returns the logits at the end of each clean prompt, for each circuit."""
        if self._run is not None:
            return [self._run(mask) for mask in masks]
        order = torch.cat([rows for rows, _ in self._parts]).argsort()
        with torch.no_grad():
            return [self.exp.nodes.logits(final)[order.to(final.device)] for final in self.finals(masks)]

    def finals(self, masks: Sequence[Bool[Tensor, "input source"]]) -> list[Float[Tensor, "pair d_model"]]:
        """Returns the final residual stream at the end of each prompt, in the order of the experiment's passes.

        Only if nodes can be run one by one.
        """
        with torch.no_grad():
            by_part = [versions.finals(masks) for _, versions in self._parts]
        return [torch.cat(parts) for parts in zip(*by_part, strict=True)]

    def keep_only(self, mask: Bool[Tensor, "input source"]) -> None:
        """Forgets what was computed, except for one circuit, on which the next ones are to build."""
        for _, versions in self._parts:
            versions.keep_only(mask)

    def value(self, mask: Bool[Tensor, "input source"]) -> float:
        """Returns the mean metric of the circuit with these edges."""
        return float(self.exp.values(self([mask])[0]).mean())


# ------------------------------------------------------------------------------------------------------------ versions


class _Port(NamedTuple):
    """Query, key or value of a head."""

    lane: Lane
    to: int
    """Input of the graph."""
    sent: tuple[int, ...]
    """Versions of the sources of its present edges, except sources that write what absent edges carry."""


class _Output(NamedTuple):
    """What a head or MLP writes minus what absent edges carry from it."""

    lane: Lane
    source: int
    """Place among the sources of the graph."""
    read: tuple[int, ...]
    """For a head, its query, key and value and, at the metric position, its earlier keys and values. For an MLP, the
    versions of the sources of its present edges."""
    masks: int | None
    """Version of the masks of its layer; `_GIVEN` for given masks; None for no masks."""


class _Gates(NamedTuple):
    """Masks of a layer."""

    layer: int
    sent: tuple[int, ...]
    """Versions of all sources below the layer, in the lane that the gates read."""
    end: int | None
    """Version of the end of the clean lane, for gates that read it; else None."""
    lane: Lane
    """Lane that the gates read."""


class _End(NamedTuple):
    """Logits or, in the clean lane below live gates, the residual stream that they are computed from."""

    lane: Lane
    sent: tuple[int, ...]


_Key = _Port | _Output | _Gates | _End
_GIVEN = -1


class _Trace(NamedTuple):
    """The versions that a circuit is made of."""

    mask: Bool[Tensor, "input source"]
    present: list[list[int]]
    """Sources of the present edges into each input."""
    versions: dict[Lane, list[int | None]]
    """Version of each source; None for one that writes what absent edges carry."""
    keys_and_values: dict[int, tuple[int, ...]]
    """Versions of the keys and values of the earlier lane, by source."""
    spoken: set[int]
    """Heads whose keys or values differ from what absent edges bring."""
    ends: dict[Lane, int]


class _Versions:
    """All versions of one batch of pairs."""

    def __init__(self, exp: Experiment, batch: PassesOfPairs) -> None:
        self.model, self.graph, self.functions = exp.model, exp.graph, exp.nodes
        self.silent = exp.ablation == "resample"
        """Whether a node without a present edge writes what absent edges carry from it."""
        self.lanes: tuple[Lane, ...] = ("clean", "ablated") if exp.edits_clean_pass else (exp.stream,)
        """Lanes of the metric position; the logits come from the last one."""
        self.live = exp.masks == "live"
        self.masks = batch.clean.masks
        # where both prompts still agree, edges carry the same whether they are present or not
        self.prompts = Prompts.of(batch.prompts.embed, batch.prompts.last, batch.first)
        kept = batch.changing
        self.carried = {
            lane: [x[kept] if lane == "earlier" else x for x in by_source] for lane, by_source in batch.carried.items()
        }
        whole = self._streams(batch.carried["earlier"])
        self.before = [self._keys_and_values(layer, whole, batch.prompts) for layer in range(self.graph.n_layers)]
        self.base = {lane: self._streams(by_source) for lane, by_source in self.carried.items()}
        self.embedded = {
            lane: self.prompts.rows(lane, self.prompts.embed) - by_source[0] for lane, by_source in self.carried.items()
        }
        self._forget()

    def _forget(self) -> None:
        self.ids: dict[_Key, int] = {}
        self.keys: dict[int, _Key] = {}
        self.last_id = -1
        self.values: dict[int, Any] = {}
        self.held = self.kept = 0
        """Bytes of all values, and of those that `keep_only` kept."""
        self.last_trace: _Trace | None = None
        self.last_sum: tuple[tuple[int, ...], Tensor] | None = None
        self.embed = {lane: self._keep(_Output(lane, 0, (), None), x) for lane, x in self.embedded.items()}

    def keep_only(self, mask: Bool[Tensor, "input source"]) -> None:
        """Forgets all versions that this circuit does not consist of."""
        self._trace(mask)
        trace = self.last_trace
        assert trace is not None
        used: set[int] = set()
        waiting = [*trace.ends.values(), *(v for pair in trace.keys_and_values.values() for v in pair)]
        waiting += [v for by_source in trace.versions.values() for v in by_source if v is not None]
        while waiting:
            version = waiting.pop()
            if version not in used:
                used.add(version)
                waiting += self._needs(self.keys[version])
        self.keys = {version: self.keys[version] for version in used}
        self.ids = {key: version for version, key in self.keys.items()}
        self.values = {version: _alone(x) for version, x in self.values.items() if version in used}
        self.held = self.kept = sum(map(_bytes, self.values.values()))
        self.last_sum = None

    def _id(self, key: _Key) -> int:
        if key not in self.ids:
            self.last_id += 1
            self.ids[key], self.keys[self.last_id] = self.last_id, key
        return self.ids[key]

    def _keep(self, key: _Key, value: Any) -> int:
        version = self._id(key)
        self.values[version] = value
        self.held += _bytes(value)
        return version

    def _streams(self, carried: Sequence[Tensor]) -> dict[int, Float[Tensor, "row d_model"]]:
        """Returns the residual stream of what absent edges carry after the first n sources, for every n."""
        by_source = [write_to_stream(self.graph, self.functions, source, x) for source, x in enumerate(carried)]
        return residual_streams(self.graph, by_source, self.functions.b_O)

    def _keys_and_values(self, layer: int, streams: Mapping[int, Tensor], prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Returns keys (before any rotation) and values `[head, pair, pos, d_head]` of what absent edges carry."""
        _, k, v = self.functions.project_all(layer, streams[self.graph.sources_before(Node("head", layer, 0))])
        padded = k.new_zeros(2, len(k), len(prompts.last), self.functions.length, k.shape[-1])
        padded[0][:, prompts.prompt, prompts.pos], padded[1][:, prompts.prompt, prompts.pos] = k, v
        return padded[0], padded[1]

    # ---------------------------------------------------------------------------------------------------- what to run

    def finals(self, masks: Sequence[Bool[Tensor, "input source"]]) -> list[Float[Tensor, "pair d_model"]]:
        """Returns the final residual stream of the circuits with these edges."""
        finals: list[Tensor] = []
        if self.held > self.kept + MEMORY:
            self._forget()
        together: list[int] = []
        missing: set[int] = set()
        size = 0
        for mask in masks:
            end = self._trace(mask)
            new = self._missing(end) - missing
            more = sum(self._size(self.keys[v]) for v in new)
            if together and size + more > MEMORY:
                finals += self._run(together, missing)
                if self.held > self.kept + MEMORY:
                    self._forget()
                    end = self._trace(mask)
                together, missing, size, new = [], set(), 0, self._missing(end)
                more = sum(self._size(self.keys[v]) for v in new)
            together.append(end)
            missing |= new
            size += more
        return finals + self._run(together, missing)

    def _run(self, ends: Sequence[int], missing: set[int]) -> list[Tensor]:
        self._compute(missing)
        finals = [self.values[end] for end in ends]
        for end in set(ends):
            self.held -= _bytes(self.values.pop(end))
        return finals

    def _size(self, key: _Key) -> int:
        """Returns the number of bytes of a version."""
        rows = len(self.prompts.prompt) if getattr(key, "lane", "") == "earlier" else len(self.prompts.last)
        _, pairs, length, d_head = self.before[0][0].shape
        match key:
            case _Port():
                numbers = (length if key.lane == "earlier" else 1) * pairs * d_head
            case _Gates():
                numbers = sum(x[0].numel() for x in self.masks[key.layer] if x is not None) * pairs
            case _:
                numbers = rows * self.prompts.embed.shape[-1]
        return numbers * self.prompts.embed.element_size()

    def _trace(self, mask: Bool[Tensor, "input source"]) -> int:
        """Returns the version of the end of a circuit, without computing it.

        Only nodes from the lowest one whose edges differ from those of the circuit before are looked at.
        """
        graph, last = self.graph, self.last_trace
        if last is None:
            start, present = 1, [row.nonzero()[:, 0].tolist() for row in mask]
            versions: dict[Lane, list[int | None]] = {lane: [version] for lane, version in self.embed.items()}
            keys_and_values: dict[int, tuple[int, ...]] = {}
            spoken: set[int] = set()
        else:
            differ = (mask != last.mask).any(1).nonzero()[:, 0].tolist()
            if not differ:
                return last.ends[self.lanes[-1]]
            start = graph.source_index.get(graph.inputs[differ[0]].node, len(graph.sources))
            present = list(last.present)
            for to in differ:
                present[to] = mask[to].nonzero()[:, 0].tolist()
            versions = {lane: by_source[:start] for lane, by_source in last.versions.items()}
            keys_and_values = {source: pair for source, pair in last.keys_and_values.items() if source < start}
            spoken = {source for source in last.spoken if source < start}
        ends: dict[Lane, int] = {}

        def sent(lane: Lane, to: int) -> tuple[int, ...]:
            return tuple(v for source in present[to] if (v := versions[lane][source]) is not None)

        lanes: tuple[Lane, ...] = ("earlier", *self.lanes)
        for lane in lanes:
            moved_end = lane == "ablated" and "clean" in ends and (last is None or last.ends["clean"] != ends["clean"])
            if moved_end and self.model.gates.reads_global:  # type: ignore[attr-defined]
                versions[lane] = versions[lane][:1]
            gates: dict[int, tuple[int, bool]] = {}
            for source in range(len(versions[lane]), len(graph.sources)):
                node = graph.sources[source]
                masks, changed = None, not self.silent
                if lane == "ablated":
                    if node.layer not in gates:
                        gates[node.layer] = self._masks(node, versions, ends.get("clean"))
                    masks, moved = gates[node.layer]
                    changed |= moved
                inputs = graph.inputs_of[node]
                arriving = [sent(lane, to) for to in inputs]
                changed |= any(arriving)
                read = arriving[0]
                if node.kind == "head":
                    read = tuple(self._id(_Port(lane, to, s)) for to, s in zip(inputs, arriving, strict=True))
                    if lane == "earlier":
                        keys_and_values[source] = read[1:]
                        if any(arriving[1:]):
                            spoken.add(source)
                    else:
                        read += keys_and_values[source]
                        changed |= source in spoken
                versions[lane].append(self._id(_Output(lane, source, read, masks)) if changed else None)
            if lane != "earlier":
                ends[lane] = self._id(_End(lane, sent(lane, -1)))
        self.last_trace = _Trace(mask.clone(), present, versions, keys_and_values, spoken, ends)
        return ends[self.lanes[-1]]

    def _masks(self, node: Node, versions: Mapping[Lane, Sequence[int | None]], end: int | None) -> tuple[int, bool]:
        """Returns the version of the masks of a node's layer, and whether they may differ from those carried."""
        if not self.live:
            return _GIVEN, True
        gates = self.model.gates  # type: ignore[attr-defined]
        below = self.graph.sources_before(Node("head", node.layer, 0))
        lane: Lane = self.lanes[0]
        sent = tuple(v for v in versions[lane][:below] if v is not None) if gates.reads_local else ()
        read = end if gates.reads_global else None
        moved = bool(sent) or (read is not None and bool(self.keys[read].sent))  # type: ignore[union-attr]
        return self._id(_Gates(node.layer, sent, read, lane)), moved

    # ------------------------------------------------------------------------------------------------------ computation

    def _missing(self, end: int) -> set[int]:
        """Returns a version and all versions that it needs, as far as they are not computed."""
        missing: set[int] = set()
        waiting = [end] if end not in self.values else []
        while waiting:
            version = waiting.pop()
            if version not in missing:
                missing.add(version)
                waiting += [v for v in self._needs(self.keys[version]) if v not in self.values]
        return missing

    def _compute(self, missing: set[int]) -> None:
        """Computes versions, the lowest first."""
        ordered = sorted((self._stage(self.keys[v]), v) for v in missing)
        steps: tuple[Callable[..., None], ...] = (
            *(self._compute_gates, self._compute_ports, self._compute_heads, self._compute_mlps),
            self._compute_ends,
        )
        for (_, layer, step, lane), group in groupby(ordered, key=lambda item: item[0]):
            steps[step](lane, layer, [self.keys[v] for _, v in group])

    def _needs(self, key: _Key) -> Iterable[int]:
        match key:
            case _Output():
                return (*key.read, *(() if key.masks in (None, _GIVEN) else (key.masks,)))
            case _Gates():
                return (*key.sent, *(() if key.end is None else (key.end,)))
        return key.sent

    def _stage(self, key: _Key) -> tuple[int, int, int, str]:
        """Returns the order of computation: the clean lane, the gates that read it, the ablated lane with its gates."""
        match key:
            case _Gates():
                return 1 + (key.lane == "ablated"), key.layer, 0, key.lane
            case _Port():
                return 2 * (key.lane == "ablated"), self.graph.inputs[key.to].node.layer, 1, key.lane
            case _Output():
                node = self.graph.sources[key.source]
                return 2 * (key.lane == "ablated"), node.layer, 2 if node.kind == "head" else 3, key.lane
        return 2 * (key.lane == "ablated"), self.graph.n_layers, 4, key.lane

    def _inputs(self, lane: Lane, to: int, sent: Sequence[tuple[int, ...]]) -> Float[Tensor, "version row d_model"]:
        """Returns the inputs of one step from the versions that are sent to each; `to` is one of these inputs."""
        base = self.base[lane][self.graph.n_sources[to]]
        different = {v: i for i, v in enumerate(dict.fromkeys(v for versions in sent for v in versions))}
        if not different:
            return base.expand(len(sent), -1, -1)
        places = torch.tensor([(row, different[v]) for row, versions in enumerate(sent) for v in versions]).T
        taken = base.new_zeros(len(sent), len(different))
        taken[places[0], places[1]] = 1
        changes = torch.stack([self.values[v] for v in different]).flatten(1)
        return torch.addmm(base.reshape(1, -1), taken, changes).view(len(sent), *base.shape)

    def _split(self, keys: Sequence[Any], numbers: int) -> Iterator[Sequence[Any]]:
        """Yields the keys in parts, each with at most `_BLOCK` entries."""
        count = max(1, _BLOCK // max(1, numbers))
        for first in range(0, len(keys), count):
            yield keys[first : first + count]

    def _compute_ports(self, lane: Lane, layer: int, keys: Sequence[_Port]) -> None:
        for part in self._split(keys, self.base[lane][1].numel()):
            inputs = [self.graph.inputs[key.to] for key in part]
            ports, heads = [PORTS.index(to.port) for to in inputs], [to.node.head for to in inputs]
            x = self._inputs(lane, part[0].to, [key.sent for key in part])
            for key, port, head, y in zip(
                part, ports, heads, self.functions.project_each(layer, ports, heads, x), strict=True
            ):
                if lane == "earlier":
                    padded = self.before[layer][max(0, port - 1)][head].clone()
                    padded[self.prompts.prompt, self.prompts.pos] = y
                    # queries of other rows are not used
                    y = self.functions.rotate(layer, port, padded)
                else:
                    y = self.functions.rotate(layer, port, y[:, None], self.prompts.last[:, None])
                self._keep(key, y)

    def _compute_heads(self, lane: Lane, layer: int, keys: Sequence[_Output]) -> None:
        pairs, length = len(self.prompts.last), self.functions.length
        width = length if lane == "earlier" else 1
        for part in self._split(keys, pairs * length * (width + self.functions.W_O[layer].shape[1])):
            heads = [self.graph.sources[key.source].head for key in part]
            q, k, v, *earlier = (
                torch.stack([self.values[key.read[i]] for key in part]) for i in range(len(part[0].read))
            )
            if lane == "earlier":
                z = self.functions.attend(layer, q, k, v)[:, self.prompts.prompt, self.prompts.pos]
            else:
                every = torch.arange(pairs, device=q.device)
                all_k, all_v = earlier
                all_k[:, every, self.prompts.last], all_v[:, every, self.prompts.last] = k[:, :, 0], v[:, :, 0]
                z = self.functions.attend(layer, q, all_k, all_v, self.prompts.last)[:, :, 0]
                masks = [self._mask(key, layer, 0) for key in part]
                if masks[0] is not None:
                    z = z * torch.stack([m[:, head] for m, head in zip(masks, heads, strict=True) if m is not None])
            z = z - torch.stack([self.carried[lane][key.source] for key in part])
            written = torch.bmm(z, self.functions.W_O[layer][torch.tensor(heads)])
            for key, change in zip(part, written, strict=True):
                self._keep(key, change)

    def _compute_mlps(self, lane: Lane, layer: int, keys: Sequence[_Output]) -> None:
        to = self.graph.inputs_of[Node("mlp", layer)][0]
        for part in self._split(keys, self.base[lane][1].numel() * 4):
            masks = [self._mask(key, layer, 1) for key in part]
            mask = None if masks[0] is None else torch.stack(masks)  # type: ignore[arg-type]
            out = self.functions.mlp(layer, self._inputs(lane, to, [key.read for key in part]), mask)
            for key, change in zip(part, out - self.carried[lane][part[0].source], strict=True):
                self._keep(key, change)

    def _mask(self, key: _Output, layer: int, kind: int) -> Tensor | None:
        """Returns the mask of the attention units (0) or neurons (1) of a layer."""
        if key.masks is None:
            return None
        return (self.masks[layer] if key.masks == _GIVEN else self.values[key.masks])[kind]

    def _compute_gates(self, lane: Lane, layer: int, keys: Sequence[_Gates]) -> None:
        to = self.graph.inputs_of[Node("head", layer, 0)][0]
        for part in self._split(keys, self.base[lane][1].numel()):
            # most circuits that run together agree on most nodes below
            shared = _shared_start([key.sent for key in part])
            local = self._inputs(lane, to, [key.sent[len(shared) :] for key in part]) + self._sum(shared)
            final = None if part[0].end is None else torch.cat([self.values[key.end] for key in part])
            masks = gate_masks(self.model, layer, local.flatten(0, 1), final)
            each = zip(*(self._by_key(m, len(part)) for m in masks), strict=True)
            for key, chosen in zip(part, each, strict=True):
                self._keep(key, chosen)

    def _by_key(self, masks: Tensor | None, keys: int) -> Sequence[Tensor | None]:
        return [None] * keys if masks is None else masks.unflatten(0, (keys, -1)).unbind()

    def _sum(self, versions: tuple[int, ...]) -> Tensor | float:
        """Returns the sum of versions; the last one is remembered."""
        if not versions:
            return 0.0
        if self.last_sum is None or self.last_sum[0] != versions:
            self.last_sum = versions, torch.stack([self.values[v] for v in versions]).sum(0)
        return self.last_sum[1]

    def _compute_ends(self, lane: Lane, layer: int, keys: Sequence[_End]) -> None:
        for part in self._split(keys, self.base[lane][1].numel()):
            x = self._inputs(lane, len(self.graph.inputs) - 1, [key.sent for key in part])
            for key, value in zip(part, x, strict=True):
                self._keep(key, value)


def _shared_start(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the longest start that all sequences have in common."""
    first, last = min(sequences), max(sequences)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _parts(value: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in (value if isinstance(value, tuple) else (value,)) if x is not None)


def _bytes(value: Any) -> int:
    return sum(x.nbytes for x in _parts(value))


def _alone(value: Any) -> Any:
    """Returns a value in memory of its own, without those that were computed together with it."""
    if isinstance(value, tuple):
        return tuple(map(_alone, value))
    shared = value is not None and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if shared else value
