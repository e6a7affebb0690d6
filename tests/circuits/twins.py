"""Slow, plain versions of circuit runs and of ACDC: TransformerLens hooks on one prompt length, edge by edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sa_lens.circuits.graph import Edge, Graph, Node
from sa_lens.core import HookedTransformer


def outputs(cache: Any, model: HookedTransformer) -> dict[str, Tensor]:
    """What each source writes, by its name, from a cache."""
    found = {"embed": cache["blocks.0.hook_resid_pre"]}
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            z = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
            found[f"a{layer}.h{head}"] = z @ model.blocks[layer].attn.W_O[head]
        if not model.cfg.attn_only:
            found[f"m{layer}"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return found


def set_switches(model: HookedTransformer) -> None:
    model.set_use_split_qkv_input(True)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(True)
    if model.cfg.n_key_value_heads is not None:
        model.set_ungroup_grouped_query_attention(True)


def edge_hooks(
    model: HookedTransformer, graph: Graph, removed: set[Edge], carried: dict[str, Tensor]
) -> list[tuple[str, Callable]]:
    """Hooks for one pass in which each removed edge carries `carried[source]` instead."""
    now: dict[str, Tensor] = {}

    def read_embed(x: Tensor, hook: Any) -> None:
        now["embed"] = x

    def read_z(x: Tensor, hook: Any) -> None:
        for head in range(model.cfg.n_heads):
            now[f"a{hook.layer()}.h{head}"] = x[:, :, head] @ model.blocks[hook.layer()].attn.W_O[head]

    def read_mlp(x: Tensor, hook: Any) -> None:
        now[f"m{hook.layer()}"] = x

    into: dict[tuple[Node, str], list[str]] = {}
    for edge in removed:
        into.setdefault((edge.destination, edge.port), []).append(str(edge.source))

    def edit_port(port: str) -> Callable:
        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            for head in range(model.cfg.n_heads):
                for source in into.get((Node("head", hook.layer(), head), port), []):
                    x[:, :, head] += carried[source] - now[source]
            return x

        return edit

    def edit_node(node: Node) -> Callable:
        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            for source in into.get((node, ""), []):
                x += carried[source] - now[source]
            return x

        return edit

    # where nothing is removed, no hook would change or record anything that is used
    sources = {str(edge.source) for edge in removed}
    hooks: list[tuple[str, Callable]] = [("blocks.0.hook_resid_pre", read_embed)]
    for layer in range(model.cfg.n_layers):
        heads = [Node("head", layer, head) for head in range(model.cfg.n_heads)]
        for port in "qkv":
            if any((head, port) in into for head in heads):
                hooks.append((f"blocks.{layer}.hook_{port}_input", edit_port(port)))
        if any(str(head) in sources for head in heads):
            hooks.append((f"blocks.{layer}.attn.hook_z", read_z))
        if (Node("mlp", layer), "") in into:
            hooks.append((f"blocks.{layer}.hook_mlp_in", edit_node(Node("mlp", layer))))
        if f"m{layer}" in sources:
            hooks.append((f"blocks.{layer}.hook_mlp_out", read_mlp))
    hooks.append((f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", edit_node(Node("logits"))))
    return hooks


class SlowRuns:
    """Runs of edited models for one set of equally long prompts, by whole passes."""

    def __init__(
        self,
        model: HookedTransformer,
        clean: Tensor,
        corrupt: Tensor,
        *,
        ablation: str = "resample",
        stream: str = "clean",
        masks: str = "frozen",
    ) -> None:
        self.model, self.clean, self.graph = model, clean, Graph.from_model(model)
        self.stream, self.masks = stream, masks
        set_switches(model)

        def carried(in_stream: str) -> dict[str, Tensor]:
            with self.context(in_stream):
                _, cache = model.run_with_cache(corrupt)
            found = outputs(cache, model)
            if ablation == "zero":
                return {name: torch.zeros_like(x) for name, x in found.items()}
            if ablation == "mean":
                return {name: x.mean(0, keepdim=True).expand_as(x) for name, x in found.items()}
            return found

        with torch.no_grad():
            self.carried = carried(stream)
            self.carried_clean = carried("clean") if stream == "ablated" else {}
            with self.context(stream):
                self.reference = model(clean)[:, -1]

    def context(self, stream: str, hooks: Sequence[Any] = (), masks: str = "frozen") -> Any:
        if stream == "clean":
            return nullcontext()
        return self.model.ablated(position=-1, masks=masks, clean_hooks=hooks)

    def logits(self, removed: set[Edge]) -> Tensor:
        """Logits at the last position."""
        hooks = edge_hooks(self.model, self.graph, removed, self.carried)
        live = self.stream == "ablated" and self.masks == "live"
        own = live and self.model.gates.reads_ablated
        in_clean = edge_hooks(self.model, self.graph, removed, self.carried_clean) if live and not own else []
        with torch.no_grad(), self.context(self.stream, in_clean, "live" if own else "frozen"):
            return self.model.run_with_hooks(self.clean, fwd_hooks=hooks)[:, -1]

    def kl(self, removed: set[Edge]) -> float:
        """Mean KL(unedited clean prompt || edited), nats."""
        p, q = self.reference.log_softmax(-1), self.logits(removed).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).double().mean())


def slow_acdc(
    order: Sequence[Edge], cost: Callable[[set[Edge]], float], tau: float
) -> tuple[set[Edge], dict[Edge, float]]:
    """Kept edges and the rise in cost that each edge's removal would have brought when it was visited."""
    removed: set[Edge] = set()
    rises: dict[Edge, float] = {}
    before = cost(removed)
    for edge in order:
        after = cost(removed | {edge})
        rises[edge] = after - before
        if after - before < tau:
            removed.add(edge)
            before = after
    return set(order) - removed, rises
