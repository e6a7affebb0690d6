"""The computational graph of a transformer and circuits in it.

Nodes have no token positions. Sources: the embedding (with positions), every head, every MLP. Destinations: query, key
and value input of every head, the input of every MLP, the final residual stream. There is an edge wherever the source
is computed before the destination; attention and MLP of a layer are separate steps, unless the model runs them side by
side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.config import convert, from_dict
from sa_lens.core.host import Host
from sa_lens.core.nodes import why_not_additive
from sa_lens.data.whole_files import DamagedFile, atomic_write, check_object, read_json

FORMAT, VERSION = "sa_lens circuit", 1
"""Format and version that files of circuits name."""

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["embed", "head", "mlp", "logits"]
Port = Literal["q", "k", "v", ""]
PORTS: tuple[Port, ...] = ("q", "k", "v")


class Node(NamedTuple):
    """A node: `embed`, a head `a2.h5`, an MLP `m2`, or `logits`."""

    kind: Kind
    layer: int = -1
    """Layer of a head or MLP; -1 for `embed` and `logits`."""
    head: int = -1
    """Index of a head in its layer; -1 for others."""

    def __str__(self) -> str:
        match self.kind:
            case "head":
                return f"a{self.layer}.h{self.head}"
            case "mlp":
                return f"m{self.layer}"
        return self.kind


class Edge(NamedTuple):
    """An edge, written `a0.h3->a1.h2.q`: the contribution of a source to one input of a destination."""

    source: Node
    destination: Node
    port: Port = ""
    """`q`, `k` or `v` of a head; empty for an MLP and the logits, which have one input."""

    def __str__(self) -> str:
        return f"{self.source}->{self.destination}" + (f".{self.port}" if self.port else "")


class Input(NamedTuple):
    """An input of a node, at which edges end."""

    node: Node
    port: Port = ""


@dataclass(frozen=True)
class Graph:
    """All nodes and edges of a transformer of one shape.

    Sources and inputs are in the order of computation: layer by layer, heads by index, `q`, `k`, `v` of a head
    together. An edge is named by its place (input, source), a pair of indices.
    """

    n_layers: int
    """Layers of the transformer."""
    n_heads: int
    """Heads of a layer. Where heads share keys and values, each has an input of its own for them."""
    attn_only: bool = False
    """Whether the model has no MLPs."""
    parallel: bool = False
    """Whether attention and MLP of a layer read the same input, so that there are no edges between them."""

    @classmethod
    def from_model(cls, model: Host) -> Graph:
        """Returns the graph of a model.

        Raises:
            ValueError: in this architecture the outputs of heads and MLPs do not simply add up.
        """
        reason = why_not_additive(model)
        if reason is not None:
            raise ValueError(f"no graph of edges for this {type(model).__name__}, which has {reason}")
        cfg = model.cfg
        return cls(cfg.n_layers, cfg.n_heads, bool(cfg.attn_only), bool(cfg.parallel_attn_mlp))

    @cached_property
    def sources(self) -> tuple[Node, ...]:
        """Nodes that write to the residual stream, in the order of computation."""
        nodes = [Node("embed")]
        for layer in range(self.n_layers):
            nodes += [Node("head", layer, head) for head in range(self.n_heads)]
            if not self.attn_only:
                nodes.append(Node("mlp", layer))
        return tuple(nodes)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Inputs of all nodes, in the order of computation."""
        readers = (*self.sources[1:], Node("logits"))
        return tuple(Input(node, port) for node in readers for port in (PORTS if node.kind == "head" else ("",)))

    @cached_property
    def inputs_of(self) -> dict[Node, list[int]]:
        """Indices in `inputs` of the inputs of each node: three for a head, none for the embedding, one for others."""
        own: dict[Node, list[int]] = {node: [] for node in (*self.sources, Node("logits"))}
        for i, to in enumerate(self.inputs):
            own[to.node].append(i)
        return own

    @cached_property
    def n_sources(self) -> tuple[int, ...]:
        """Number of edges into each input; they come from the first so many sources."""
        return tuple(self.sources_before(i.node) for i in self.inputs)

    def sources_before(self, node: Node) -> int:
        """Returns the number of sources that are computed before the node."""
        a_layer = self.n_heads + (not self.attn_only)
        match node.kind:
            case "embed":
                return 0
            case "logits":
                return len(self.sources)
            case "mlp" if not self.parallel:
                return 1 + node.layer * a_layer + self.n_heads
        return 1 + node.layer * a_layer

    @cached_property
    def source_index(self) -> dict[Node, int]:
        """Index of each source in `sources`."""
        return {node: i for i, node in enumerate(self.sources)}

    @cached_property
    def input_index(self) -> dict[Input, int]:
        """Index of each input in `inputs`."""
        return {node: i for i, node in enumerate(self.inputs)}

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, in the order of their inputs, then of their sources."""
        return tuple(
            Edge(self.sources[s], *to) for to, n in zip(self.inputs, self.n_sources, strict=True) for s in range(n)
        )

    @cached_property
    def exists(self) -> Bool[Tensor, "input source"]:
        """Matrix that is True where there is an edge."""
        return torch.arange(len(self.sources)) < torch.tensor(self.n_sources)[:, None]

    def __len__(self) -> int:
        return sum(self.n_sources)

    def place(self, edge: Edge | str) -> tuple[int, int]:
        """Returns the place (input, source) of an edge, which may be given as text.

        Raises:
            ValueError: the graph has no such edge.
        """
        edge = parse_edge(edge) if isinstance(edge, str) else edge
        to = self.input_index.get(Input(edge.destination, edge.port))
        source = self.source_index.get(edge.source)
        if to is None or source is None or source >= self.n_sources[to]:
            raise ValueError(
                f"no edge {edge} in a graph of {self.n_layers} layers with {self.n_heads} heads: edges look like "
                "'embed->a0.h1.q', 'a0.h1->m0' or 'm0->logits', from earlier to later"
            )
        return to, source

    def edge(self, to: int, source: int) -> Edge:
        """Returns the edge at a place (input, source)."""
        return Edge(self.sources[source], *self.inputs[to])


def source_hooks(graph: Graph) -> list[str]:
    """Returns the hook points at which sources write: the embedding, then `z` and the MLP of each layer."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(graph.n_layers):
        names.append(f"blocks.{layer}.attn.hook_z")
        if not graph.attn_only:
            names.append(f"blocks.{layer}.hook_mlp_out")
    return names


def input_hooks(graph: Graph) -> dict[str, list[int]]:
    """Returns the hook points at which edges end, each with the indices of its inputs."""
    hooks: dict[str, list[int]] = {}
    for layer in range(graph.n_layers):
        heads = [graph.inputs_of[Node("head", layer, head)] for head in range(graph.n_heads)]
        for port, inputs in zip(PORTS, zip(*heads, strict=True), strict=True):
            hooks[f"blocks.{layer}.hook_{port}_input"] = list(inputs)
        if not graph.attn_only:
            hooks[f"blocks.{layer}.hook_mlp_in"] = graph.inputs_of[Node("mlp", layer)]
    hooks[f"blocks.{graph.n_layers - 1}.hook_resid_post"] = graph.inputs_of[Node("logits")]
    return hooks


def edge_hook_names(model: Host) -> list[str]:
    """Returns the hook points that runs of circuits read or edit."""
    graph = Graph(model.cfg.n_layers, model.cfg.n_heads, bool(model.cfg.attn_only))
    return [*source_hooks(graph), *input_hooks(graph)]


def parse_node(text: str) -> Node:
    """Reads a node from a name such as `a2.h5`.

    Raises:
        ValueError: the text is not the name of a node.
    """
    if text in ("embed", "logits"):
        return Node(text)  # type: ignore[arg-type]
    name = re.fullmatch(r"m(\d+)|a(\d+)\.h(\d+)", text)
    if name is None:
        raise ValueError(f"{text!r} names no node: use 'embed', 'a0.h1' (layer 0, head 1), 'm0' or 'logits'")
    mlp, layer, head = name.groups()
    return Node("mlp", int(mlp)) if mlp else Node("head", int(layer), int(head))


def parse_edge(text: str) -> Edge:
    """Reads an edge from a name such as `a0.h3->a1.h2.q`.

    Raises:
        ValueError: the text is not the name of an edge.
    """
    source, arrow, to = text.partition("->")
    if not arrow:
        raise ValueError(f"{text!r} names no edge: write 'source->destination', such as 'a0.h3->a1.h2.q'")
    for port in PORTS:
        if to.endswith(f".{port}"):
            return Edge(parse_node(source), parse_node(to[:-2]), port)
    return Edge(parse_node(source), parse_node(to))


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a graph; any edge, inside the set or not, may have a score."""

    graph: Graph
    """The graph that the edges belong to."""
    mask: Bool[Tensor, "input source"]
    """True for the edges of the circuit; inputs and sources as in the graph."""
    scores: Float[Tensor, "input source"]
    """Score of each edge in float64; NaN for edges without a score."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the search: method, stream, masks, ablation, metric, ...; plain values that JSON can hold."""

    def __post_init__(self) -> None:
        shape = tuple(self.graph.exists.shape)
        for name, kind in (("mask", torch.bool), ("scores", torch.float64)):
            value = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != kind or value.device.type != "cpu":
                raise ValueError(
                    f"circuit.{name} is {value.dtype} of shape {tuple(value.shape)} on {value.device}: this graph "
                    f"needs {kind} of shape {shape} on the CPU"
                )
        if bool((self.mask & ~self.graph.exists).any()):
            raise ValueError("circuit.mask marks a pair of nodes between which the graph has no edge")

    @classmethod
    def of(
        cls,
        graph: Graph,
        edges: Iterable[Edge | str] | Mapping[Edge | str, float] = (),
        about: Mapping[str, Any] | None = None,
    ) -> Circuit:
        """Makes a circuit of the given edges; a mapping also gives their scores.

        Raises:
            ValueError: the graph does not have one of the edges.
        """
        mask = torch.zeros_like(graph.exists)
        scores = torch.full(mask.shape, torch.nan, dtype=torch.float64)
        for edge in edges:
            place = graph.place(edge)
            mask[place] = True
            if isinstance(edges, Mapping):
                scores[place] = edges[edge]
        return cls(graph, mask, scores, dict(about or {}))

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """Makes the circuit of all edges of a graph, without scores."""
        return cls.of(graph, graph.edges)

    @classmethod
    def top(
        cls,
        graph: Graph,
        scores: Float[Tensor, "input source"],
        n: int,
        about: Mapping[str, Any] | None = None,
        *,
        absolute: bool = True,
    ) -> Circuit:
        """Makes the circuit of the n edges with the largest scores; among equal scores the order of the graph decides.

        Args:
            scores: a score for every edge; entries that are no edge are ignored.
            absolute: whether to compare absolute values.

        Raises:
            ValueError: n is larger than the number of edges, or an edge has no score.
        """
        if not 0 <= n <= len(graph):
            raise ValueError(f"n={n} edges: choose from 0 to the graph's {len(graph)}")
        scores = scores.detach().double().cpu().masked_fill(~graph.exists, torch.nan)
        values = scores[graph.exists]
        if bool(values.isnan().any()):
            raise ValueError(f"{int(values.isnan().sum())} edges have no score: a ranking needs one for every edge")
        order = (values.abs() if absolute else values).sort(descending=True, stable=True).indices
        chosen = torch.zeros(len(graph), dtype=torch.bool)
        chosen[order[:n]] = True
        mask = torch.zeros_like(graph.exists)
        mask[graph.exists] = chosen
        return cls(graph, mask, scores, dict(about or {}))

    def keep(self, n: int, *, absolute: bool = True) -> Circuit:
        """Makes the circuit of the n edges with the largest scores; all edges must have scores. See `top`."""
        return Circuit.top(self.graph, self.scores, n, self.about, absolute=absolute)

    def check_fits(self, graph: Graph) -> None:
        """Checks that the circuit belongs to a model with this graph.

        Raises:
            ValueError: it belongs to another graph.
        """
        if self.graph != graph:
            raise ValueError(f"a circuit of {self.graph} does not fit this model, whose graph is {graph}")

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __iter__(self) -> Iterator[Edge]:
        for to, source in self.mask.nonzero().tolist():
            yield self.graph.edge(to, source)

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, tuple | str) and bool(self.mask[self.graph.place(edge)])  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        """Returns whether graph and edges are the same; scores may differ."""
        return isinstance(other, Circuit) and self.graph == other.graph and bool(torch.equal(self.mask, other.mask))

    __hash__ = None  # type: ignore[assignment]

    def score(self, edge: Edge | str) -> float:
        """Returns the score of an edge, or NaN if it has none."""
        return float(self.scores[self.graph.place(edge)])

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes at which an edge of the circuit begins or ends, in the order of computation."""
        ends = {node for edge in self for node in edge[:2]}
        return tuple(node for node in (*self.graph.sources, Node("logits")) if node in ends)

    def prune_dangling(self) -> Circuit:
        """Returns the circuit without the edges that are on no path from the embedding to the logits."""
        graph, mask = self.graph, self.mask.clone()
        reached = {Node("embed")}
        for i, to in enumerate(graph.inputs):
            fed = [s for s in mask[i].nonzero()[:, 0].tolist() if graph.sources[s] in reached]
            mask[i] = False
            mask[i, fed] = True
            if fed:
                reached.add(to.node)
        useful = {Node("logits")}
        for i in reversed(range(len(graph.inputs))):
            if graph.inputs[i].node not in useful:
                mask[i] = False
            useful |= {graph.sources[s] for s in mask[i].nonzero()[:, 0].tolist()}
        return replace(self, mask=mask)

    def jaccard(self, other: Circuit) -> float:
        """Returns the number of edges in both circuits over that in either; 1 if both are empty.

        Raises:
            ValueError: the circuits belong to different graphs.
        """
        if self.graph != other.graph:
            raise ValueError(f"circuits of different graphs have no overlap: {self.graph} and {other.graph}")
        either = int((self.mask | other.mask).sum())
        return int((self.mask & other.mask).sum()) / either if either else 1.0

    def table(self, every: bool = False) -> pd.DataFrame:
        """Returns one row per edge.

        Its columns are edge, source, destination, port, source_layer, destination_layer, score and in_circuit.

        Args:
            every: whether to include the edges outside the circuit.
        """
        import pandas as pd

        places = (self.graph.exists if every else self.mask).nonzero().tolist()
        edges = [self.graph.edge(to, source) for to, source in places]
        to_layer = [e.destination.layer if e.destination.kind != "logits" else self.graph.n_layers for e in edges]
        return pd.DataFrame(
            {
                "edge": [str(edge) for edge in edges],
                "source": [str(edge.source) for edge in edges],
                "destination": [str(edge.destination) for edge in edges],
                "port": [edge.port for edge in edges],
                "source_layer": [edge.source.layer for edge in edges],
                "destination_layer": to_layer,
                "score": [float(self.scores[to, source]) for to, source in places],
                "in_circuit": [bool(self.mask[to, source]) for to, source in places],
            }
        )

    def node_table(self) -> pd.DataFrame:
        """Returns one row per node: node, kind, layer, head, edges in and out, and the sums of their absolute scores.

        Edges without a score add nothing to `score_in` and `score_out`.
        """
        import pandas as pd

        size = torch.where(self.mask, self.scores, 0.0).abs().nan_to_num(0.0)
        rows = []
        for start, (node, ends) in enumerate(self.graph.inputs_of.items()):
            # the logits write nothing: the slice behind the last source is empty
            out = slice(start, start + 1)
            rows.append(
                {
                    **{"node": str(node), **node._asdict()},
                    **{"edges_in": int(self.mask[ends].sum()), "edges_out": int(self.mask[:, out].sum())},
                    **{"score_in": float(size[ends].sum()), "score_out": float(size[:, out].sum())},
                }
            )
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Writes the circuit as JSON: graph, settings of the search, edges and all scores."""
        scored = (self.graph.exists & ~self.scores.isnan()).nonzero().tolist()
        content = {
            "format": FORMAT,
            "version": VERSION,
            "graph": asdict(self.graph),
            "about": dict(self.about),
            "edges": [str(edge) for edge in self],
            "scores": {str(self.graph.edge(to, s)): float(self.scores[to, s]) for to, s in scored},
        }
        path = Path(path)
        atomic_write(path, json.dumps(content, indent=1).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads a circuit from JSON.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds no circuit.
        """
        path, remedy = Path(path), "find the circuit again, or take the file from a copy"
        content = read_json(path, remedy=remedy)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} holds no circuit: it must be a file that Circuit.save wrote")
        try:
            known = {"format": str, "version": int, "graph": dict, "about": dict, "edges": list, "scores": dict}
            check_object(content, known)
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, this sa_lens reads {VERSION}")
            graph = from_dict(Graph, content["graph"], where="graph.")
            if not (1 <= graph.n_layers <= 1_000 and 1 <= graph.n_heads <= 10_000):
                raise ValueError(f"there is no graph of {graph.n_layers} layers with {graph.n_heads} heads")
            circuit = cls.of(graph, convert("edges", content["edges"], list[str]), content["about"])
            for edge, score in convert("scores", content["scores"], dict[str, float]).items():
                circuit.scores[circuit.graph.place(edge)] = score
        except ValueError as error:
            raise DamagedFile(f"{path} is damaged: {error}; {remedy}") from error
        return circuit
