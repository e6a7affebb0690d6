"""Scores of all edges from a few passes: EAP, EAP-IG and RelP.

All give a `Circuit` of every edge whose score is

    an estimate of how much worse the metric's mean gets when that edge alone is ablated,

the quantity that `effects.exact_effects` computes: metric(full graph) - metric(without the edge), and the opposite for
metrics that are worse when larger (`kl`; functions count as better when larger). So an edge that helps has a positive
score, as in ACDC. Each is a sum over positions, a mean over pairs, of

    (what its source writes on the clean prompt - what the ablated edge carries) . d metric / d input of its destination

(the opposite for `kl`), and the methods differ in where, and how, that derivative is taken. With `.keep(n)` the n edges
of the largest absolute score make a circuit.

In the ablated stream the derivative is that of the pass of `model.ablated(position=-1)`. With frozen gates the masks of
the unedited clean prompt are constants. With live gates an edge also changes the clean pass that the gates read, and
the derivative goes on through the gates' surrogate weights, as it does in training: a hard mask itself has derivative 0
almost everywhere, so this is a guess at what its flips will do.

Gradients are taken with respect to activations alone; parameters, their `requires_grad` and `.grad` are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.discovery.gradients_by_hooks import (
    EdgePasses,
    batches,
    check_differentiable,
    needs_gradient_at_clean,
    products,
)
from sa_lens.circuits.discovery.gradients_by_nodes import scores_by_nodes
from sa_lens.circuits.discovery.relp_rules import propagation_rules
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.metrics import Metric, metric_named
from sa_lens.circuits.running.circuit_by_hooks import Ablation, Gates, check_choices
from sa_lens.circuits.running.removal_costs import sign_of
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, at_least_float32
from sa_lens.core.last_position import why_not_by_nodes
from sa_lens.core.nodes import split_inputs

Rule = Literal["left", "right", "midpoint"]
"""Points of EAP-IG, with k / steps the share of the way from the ablated to the clean embedding: `left` k = 0, ...,
steps - 1 (the ablated end, not the clean one); `right` k = 1, ..., steps; `midpoint` k = 1/2, 3/2, ..., steps - 1/2."""

SHIFT: dict[Rule, float] = {"left": 0.0, "right": 1.0, "midpoint": 0.5}


def eap(
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric = "logit_difference",
    *,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Circuit:
    """Edge attribution patching: the derivative at the clean prompt.

    Args:
        metric: a name of `METRICS`, or a differentiable function of the last position's logits and the pairs that gives
            a value a pair, better when larger. Not `kl`: at the clean prompt it has no gradient.
        ablation: what an ablated edge carries; see `running.Ablation`.
        gates: in the ablated stream, `frozen` (default) or `live`; see the head of this module.
        batch_size: pairs in one forward and backward pass; memory grows with it, not with the number of pairs.
        progress: a progress bar, where it takes more than a few seconds.

    Returns:
        Every edge with its score; `about` says how it was found, `value` there is the metric of the full graph.

    Raises:
        ValueError: an unknown choice, a metric without a gradient, pairs that do not fit the model.

    Source: Syed et al., arXiv 2310.10348.
    """
    needs_gradient_at_clean("eap", metric)
    return _attribute(
        "eap", model, pairs, metric, [1.0], {}, ablation, stream, gates, batch_size=batch_size, progress=progress
    )


def eap_ig(
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric = "logit_difference",
    steps: int = 5,
    *,
    rule: Rule = "left",
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Circuit:
    """Edge attribution patching with integrated gradients over the inputs: the mean derivative along a line of them.

    The line leads from the embedding that an ablated edge carries (with `resample` that of the corrupt prompt) to the
    clean prompt's; the rest of the pass is the model's own. What the derivative is multiplied with stays that of EAP.

    Args:
        metric: as in `eap`, and `kl` from the unedited clean prompt too.
        steps: points on the line, at least 1.
        rule: which points; see `Rule`. `left` is what the authors' code takes for edges.

    Other arguments, result and errors are those of `eap`.

    Source: Hanna et al., arXiv 2403.17806, and the authors' repository (`get_scores_eap_ig`; its scores of nodes take
    the points of `right`).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1; 5 is usual, more is slower")
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r} must be one of {', '.join(map(repr, get_args(Rule)))}")
    points = [(k + SHIFT[rule]) / steps for k in range(steps)]
    if points == [1.0]:
        needs_gradient_at_clean("eap_ig(steps=1, rule='right')", metric)
    more = {"steps": steps, "rule": rule}
    return _attribute(
        "eap_ig", model, pairs, metric, points, more, ablation, stream, gates, batch_size=batch_size, progress=progress
    )


def relp(
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric = "logit_difference",
    *,
    fix_attention: bool = False,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Circuit:
    """EAP with the propagation rules of RelP in place of the derivative, at the same cost.

    The denominator of every LayerNorm is a constant (LN-rule), a neuron is its input times the constant ratio of output
    to input (identity rule), and of a product of two neurons each gets half (half rule).

    Args:
        fix_attention: attention patterns are constants too (AH-rule). Edges into queries and keys then score 0.
            The authors' example leaves this rule out.

    Other arguments, result and errors are those of `eap`, but gates cannot be live.

    Source: Rezaei Jafari et al., arXiv 2508.21258, and the authors' repository.
    """
    needs_gradient_at_clean("relp", metric)
    if gates == "live":
        raise ValueError("gates='live' has no propagation rule: use relp with gates='frozen', or eap with gates='live'")
    return _attribute(
        "relp",
        model,
        pairs,
        metric,
        [1.0],
        {"fix_attention": fix_attention},
        ablation,
        stream,
        gates,
        batch_size=batch_size,
        progress=progress,
    )


@torch.inference_mode(False)
def _attribute(
    method: str,
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric,
    points: list[float],
    more: dict[str, Any],
    ablation: Ablation,
    stream: Stream,
    gates: Gates | None,
    *,
    batch_size: int,
    progress: bool,
) -> Circuit:
    """Every edge with its score, the derivative being the mean of those at these points of the line of embeddings."""
    gates_name = check_choices(model, pairs, ablation, stream, gates, batch_size)
    name = check_differentiable(metric, pairs, model.cfg.d_vocab)
    graph = Graph.from_model(model)
    total = len(pairs) * len(points)
    with tqdm(total=total, desc=method, unit=" passes", delay=3, disable=not progress) as bar:
        choices: dict[str, Any] = {"ablation": ablation, "stream": stream, "gates": gates_name}
        choices |= {"batch_size": batch_size, "done": bar.update}
        if method != "relp" and why_not_by_nodes(model) is None:
            scores, value = scores_by_nodes(model, graph, pairs, metric, points, **choices)
        else:
            rules = propagation_rules(model, stream, more["fix_attention"]) if method == "relp" else []
            scores, value = scores_by_hooks(model, graph, pairs, metric, points, rules, **choices)
    scores = (sign_of(metric) * scores / total).masked_fill(~graph.exists, torch.nan)
    if not bool(scores[graph.exists].isfinite().all()):
        raise ValueError(f"metric={name!r} or its gradient is not finite on these pairs: no score can be given")
    about = {
        "method": method,
        **{"task": pairs.task, "pairs": len(pairs), "metric": name},
        **{"ablation": ablation, "stream": stream, "gates": gates_name},
        **more,
        "value": value / len(pairs),
    }
    return Circuit(graph, graph.exists.clone(), scores, about)


def scores_by_hooks(
    model: Host,
    graph: Graph,
    pairs: PromptPairs,
    metric: str | Metric,
    points: list[float],
    rules: Sequence[Hook],
    *,
    ablation: Ablation,
    stream: Stream,
    gates: str,
    batch_size: int,
    done: Callable[[int], object],
) -> tuple[Float[Tensor, "input source"], float]:
    """What `node_gradients.scores_by_nodes` gives, of any model with hook points.

    Args:
        rules: further hooks of the passes.
    """
    scores, value = torch.zeros(graph.exists.shape, dtype=torch.float64), 0.0
    with split_inputs(model):
        passes = None
        for batch in batches(model, pairs, stream, gates, batch_size):
            passes = EdgePasses(model, graph, batch, ablation, stream, gates, batch_size, passes)
            logits = clean = None
            gradients: list[Tensor] = []
            if points != [1.0]:
                with torch.no_grad():
                    logits, clean = passes.run()
            n = len(batch.pairs)
            at_once = max(1, batch_size // n)
            for first in range(0, len(points), at_once):
                together = points[first : first + at_once]
                embed = None
                if clean is not None:
                    start, end = passes.carried[0].embed, clean[0].written.embed
                    embed = torch.cat([start + point * (end - start) for point in together])
                with torch.enable_grad():
                    now, seen = passes.run(rules, embed)
                    if logits is None or clean is None:
                        logits, clean = now.detach(), seen
                    function = metric_named(metric, logits)[1]
                    inputs = [x for one in seen for x in one.inputs.values()]
                    value_of_all = torch.stack([function(part, batch.pairs).sum() for part in now.split(n)]).sum()
                    found = torch.autograd.grad(value_of_all, inputs, materialize_grads=True)
                    found = tuple(map(at_least_float32, found))
                # their sum, so that the products, which cost as much as a pass, are taken once
                sums = [x.unflatten(0, (len(together), n)).sum(0) for x in found]
                gradients = [a + b for a, b in zip(gradients, sums, strict=True)] if gradients else sums
                done(n * len(together))
            assert logits is not None
            assert clean is not None
            named = iter(gradients)
            for one, sent in zip(seen, passes.differences(clean), strict=True):
                scores += products(graph, sent, {at: next(named) for at in one.inputs})
            value += float(function(logits, batch.pairs).detach().double().sum())
    return scores, value
