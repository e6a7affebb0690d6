"""Runs of a circuit: edges outside it carry activations of the corrupt prompt, zeros or means.

The input of every destination is that of an ordinary pass plus, for each edge outside the circuit, (what the edge
carries instead - what its source writes in this very pass). So every node is computed once, on its own inputs.

In the ablated stream this is the pass of `model.ablated(position=-1)`. Frozen gates keep the masks of the unedited
clean prompt. Live gates read the residual stream of a clean pass under the same edits (with the clean stream's own
corrupt, zero or mean activations); a gate is no destination, it always reads all of its stream. The corrupt prompt's
own run has its own masks in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.circuits.graph import PORTS, Circuit, Graph, Input, Node
from sa_lens.circuits.metrics import check_fits
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, device_of, gate_hook_names, in_stream, require_hooks, run_to_last, weight
from sa_lens.core.nodes import split_inputs

Ablation = Literal["resample", "zero", "mean"]
"""What an edge outside the circuit carries: its source's activation on the corrupt prompt; zero; or the mean of that
over the corrupt prompts of the same length, position by position. Biases of attention outputs belong to no source and
always stay."""

Gates = Literal["frozen", "live"]


class CircuitRun(NamedTuple):
    """Logits of a circuit, and how it was run."""

    logits: Float[Tensor, "pair d_vocab"]
    """Logits at the end of each clean prompt."""
    ablation: Ablation
    """What edges outside the circuit carried."""
    stream: Stream
    """The stream."""
    gates: str
    """`frozen` or `live`; `none` in the clean stream."""


class Written(NamedTuple):
    """What the sources of one pass write into the residual stream, as far as a pass needs it."""

    embed: Float[Tensor, "pair pos d_model"]
    """Embedding plus position."""
    z: list[Float[Tensor, "pair pos head d_head"]]
    """`hook_z` of each layer: after the masks in the ablated stream."""
    mlp_out: list[Float[Tensor, "pair pos d_model"]]
    """Output of each MLP; empty in an attention-only model."""

    def map(self, function: Any) -> Written:
        """The function of every tensor."""
        return Written(function(self.embed), [function(x) for x in self.z], [function(x) for x in self.mlp_out])

    def rows(self, rows: Tensor) -> Written:
        """These rows, where there is one a prompt; what holds for all prompts stays."""
        return self.map(lambda x: x[rows] if len(x) > 1 else x)


def check_choices(
    model: Host, pairs: PromptPairs, ablation: str, stream: str, gates: str | None, batch_size: int = 1
) -> str:
    """Checks the arguments that all runs of circuits share.

    Returns:
        The name of the gates: `frozen`, `live`, or `none` in the clean stream.

    Raises:
        ValueError: an unknown choice, gates in the clean stream, a model without the needed hooks, pairs that do not
            fit the model, a batch_size below 1.
    """
    if ablation not in get_args(Ablation):
        raise ValueError(f"ablation={ablation!r} must be one of {', '.join(map(repr, get_args(Ablation)))}")
    if gates not in (None, *get_args(Gates)):
        raise ValueError(f"gates={gates!r} must be 'frozen' or 'live'")
    if stream == "clean" and gates is not None:
        raise ValueError(f"gates={gates!r} needs stream='ablated': gates do not act in the clean stream")
    with in_stream(model, stream, position=-1):  # type: ignore[arg-type]
        pass
    require_hooks(model, _hook_names(model))
    check_fits(model, pairs, batch_size)
    return "none" if stream == "clean" else gates or "frozen"


def _hook_names(model: Host) -> list[str]:
    """Hook points that runs of circuits read or edit."""
    layers = range(model.cfg.n_layers)
    inside = ["hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_z", "hook_resid_pre", "hook_resid_post"]
    inside += [] if model.cfg.attn_only else ["hook_mlp_in", "hook_mlp_out"]
    return [f"blocks.{layer}.{name}" for layer in layers for name in inside]


def record_written(model: Host, tokens: Int[Tensor, "pair pos"]) -> Written:
    """What every source writes in an unedited pass of the chosen stream."""
    layers = range(model.cfg.n_layers)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.attn.hook_z" for layer in layers)]
    names += [] if model.cfg.attn_only else [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x

    run_to_last(model, tokens, [(name, keep) for name in names])
    embed, z = seen[names[0]], [seen[name] for name in names[1 : len(layers) + 1]]
    return Written(embed, z, [seen[name] for name in names[len(layers) + 1 :]])


def instead(model: Host, corrupt: Int[Tensor, "pair pos"], ablation: Ablation, batch_size: int) -> Written:
    """What edges outside a circuit carry, in the stream that is chosen: a row a prompt, or one for all."""
    parts = [
        record_written(model, part)
        for part in corrupt.split(1 if ablation == "zero" else batch_size)[: _first(ablation)]
    ]
    joined = Written(
        torch.cat([p.embed for p in parts]),
        [torch.cat(layer) for layer in zip(*(p.z for p in parts), strict=True)],
        [torch.cat(layer) for layer in zip(*(p.mlp_out for p in parts), strict=True)],
    )
    if ablation == "zero":
        return joined.map(torch.zeros_like)
    return joined.map(lambda x: x.mean(0, keepdim=True)) if ablation == "mean" else joined


def _first(ablation: Ablation) -> int | None:
    """Batches that have to be run: for zeros one prompt shows the shapes."""
    return 1 if ablation == "zero" else None


class EdgeHooks:
    """Hooks that make one pass run a circuit.

    Args:
        graph: the model's graph.
        outside: True for the edges outside the circuit.
        carried: what those carry.
    """

    def __init__(self, model: Host, graph: Graph, outside: Bool[Tensor, "input source"], carried: Written) -> None:
        self.graph = graph
        self.carried = carried
        device = device_of(model)
        self.dtype = carried.embed.dtype
        self.outside = outside.to(device, self.dtype)
        self.W_O = [weight(model, f"blocks.{layer}.attn.W_O") for layer in range(graph.n_layers)]
        self.change: Tensor | None = None
        """(carried - written in this pass) of the sources so far, `[source, pair, pos, d_model]`."""

    def hooks(self) -> list[Hook]:
        """The hooks, in TransformerLens's form."""
        graph = self.graph
        hooks: list[Hook] = [("blocks.0.hook_resid_pre", self._start)]
        for layer in range(graph.n_layers):
            for port in PORTS:
                heads = [graph.input_index[Input(Node("head", layer, h), port)] for h in range(graph.n_heads)]
                hooks.append((f"blocks.{layer}.hook_{port}_input", self._edit_heads(heads)))
            hooks.append((f"blocks.{layer}.attn.hook_z", self._heads_wrote(layer)))
            if not graph.attn_only:
                mlp = Node("mlp", layer)
                hooks.append((f"blocks.{layer}.hook_mlp_in", self._edit(graph.input_index[Input(mlp)])))
                hooks.append((f"blocks.{layer}.hook_mlp_out", self._mlp_wrote(layer)))
        last = f"blocks.{graph.n_layers - 1}.hook_resid_post"
        return [*hooks, (last, self._edit(graph.input_index[Input(Node("logits"))]))]

    def _start(self, x: Float[Tensor, "pair pos d_model"], hook: Any) -> None:
        self.change = x.new_zeros(len(self.graph.sources), *x.shape)
        self.change[0] = self.carried.embed - x

    def _heads_wrote(self, layer: int) -> Any:
        first = self.graph.source_index[Node("head", layer, 0)]

        def wrote(z: Float[Tensor, "pair pos head d_head"], hook: Any) -> None:
            assert self.change is not None
            by_head = (self.carried.z[layer] - z).permute(2, 0, 1, 3)
            self.change[first : first + len(by_head)] = by_head @ self.W_O[layer][:, None]

        return wrote

    def _mlp_wrote(self, layer: int) -> Any:
        place = self.graph.source_index[Node("mlp", layer)]

        def wrote(x: Float[Tensor, "pair pos d_model"], hook: Any) -> None:
            assert self.change is not None
            self.change[place] = self.carried.mlp_out[layer] - x

        return wrote

    def _edit_heads(self, inputs: Sequence[int]) -> Any:
        n = self.graph.n_sources[inputs[0]]

        def edit(x: Float[Tensor, "pair pos head d_model"], hook: Any) -> Tensor:
            assert self.change is not None
            return x + torch.einsum("hs,spqd->pqhd", self.outside[list(inputs), :n], self.change[:n])

        return edit

    def _edit(self, to: int) -> Any:
        n = self.graph.n_sources[to]

        def edit(x: Float[Tensor, "pair pos d_model"], hook: Any) -> Tensor:
            assert self.change is not None
            return x + torch.einsum("s,spqd->pqd", self.outside[to, :n], self.change[:n])

        return edit


class CircuitRunner:
    """Runs many circuits on the same pairs; what edges outside a circuit carry is computed once.

    Args: as `run_circuit`.
    """

    def __init__(
        self,
        model: Host,
        pairs: PromptPairs,
        ablation: Ablation = "resample",
        stream: Stream = "clean",
        gates: Gates | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        self.gates = check_choices(model, pairs, ablation, stream, gates, batch_size)
        self.model, self.pairs, self.ablation, self.stream = model, pairs, ablation, stream
        self.graph = Graph.from_model(model)
        self.batch_size = batch_size
        self._batches = list(self._prepare())

    def _prepare(self) -> Iterator[_Batch]:
        device = device_of(self.model)
        mask_names = gate_hook_names(self.model) if self.gates == "frozen" else []
        with torch.no_grad(), split_inputs(self.model):
            for rows, group in self.pairs.by_length():
                corrupt, clean = group.corrupt.to(device), group.clean.to(device)
                with in_stream(self.model, self.stream, position=-1):
                    carried = instead(self.model, corrupt, self.ablation, self.batch_size)
                in_clean_pass = None
                if self.gates == "live":
                    with in_stream(self.model, "clean"):
                        in_clean_pass = instead(self.model, corrupt, self.ablation, self.batch_size)
                for part in torch.arange(len(rows)).split(self.batch_size):
                    masks = None
                    if mask_names:
                        with in_stream(self.model, self.stream, position=-1):
                            masks = record_masks(self.model, clean[part], mask_names)
                    yield _Batch(
                        rows[part],
                        clean[part],
                        carried.rows(part),
                        in_clean_pass.rows(part) if in_clean_pass is not None else None,
                        masks,
                    )

    def __call__(self, circuit: Circuit) -> CircuitRun:
        """Logits of a circuit.

        Raises:
            ValueError: a circuit of another graph.
        """
        if circuit.graph != self.graph:
            raise ValueError(f"a circuit of {circuit.graph} does not fit this model, whose graph is {self.graph}")
        return self.run(circuit.mask)

    def run(self, mask: Bool[Tensor, "input source"]) -> CircuitRun:
        """Logits of the circuit with these edges."""
        outside = self.graph.exists & ~mask
        found, rows = [], []
        with torch.no_grad(), split_inputs(self.model):
            for batch in self._batches:
                edits = EdgeHooks(self.model, self.graph, outside, batch.carried).hooks()
                with self._chosen_stream(batch, outside):
                    found.append(run_to_last(self.model, batch.clean, edits))
                rows.append(batch.rows)
        logits = torch.cat(found)[torch.cat(rows).argsort().to(found[0].device)]
        return CircuitRun(logits, self.ablation, self.stream, self.gates)

    @contextmanager
    def _chosen_stream(self, batch: _Batch, outside: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            if batch.in_clean_pass is None:
                stack.enter_context(in_stream(self.model, self.stream, position=-1, masks=batch.masks))
            else:
                edits = EdgeHooks(self.model, self.graph, outside, batch.in_clean_pass).hooks()
                stack.enter_context(in_stream(self.model, self.stream, position=-1, clean_hooks=edits))
            yield


class _Batch(NamedTuple):
    rows: Int[Tensor, " pair"]
    clean: Int[Tensor, "pair pos"]
    carried: Written
    in_clean_pass: Written | None
    """The same of the clean stream, for live gates."""
    masks: dict[str, Tensor] | None
    """Masks of the unedited clean prompts, for frozen gates."""


def record_masks(model: Host, tokens: Int[Tensor, "pair pos"], names: list[str]) -> dict[str, Tensor]:
    """Masks of an unedited pass of the chosen stream, by hook name."""
    masks: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        masks[hook.name] = x

    if names:
        run_to_last(model, tokens, [(name, keep) for name in names])
    return masks


def run_circuit(
    model: Host,
    pairs: PromptPairs,
    circuit: Circuit,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    *,
    batch_size: int = 64,
) -> CircuitRun:
    """Logits at the end of the clean prompts when only the circuit's edges carry them.

    The full circuit gives the unedited run of the clean prompts; with `resample` the empty one gives that of the
    corrupt prompts. Without gradients; the model's switches are left as they were.

    Args:
        ablation: what edges outside the circuit carry; see `Ablation`.
        gates: in the ablated stream, `frozen` (default): masks of the unedited clean prompt. `live`: recomputed under
            the same edits.
        batch_size: prompts run at once.

    Raises:
        ValueError: an unknown choice, gates in the clean stream, a circuit of another graph, pairs that do not align
            or do not fit the model, a model without the needed hooks.
    """
    return CircuitRunner(model, pairs, ablation, stream, gates, batch_size=batch_size)(circuit)
