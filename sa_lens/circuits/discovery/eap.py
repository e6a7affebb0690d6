"""EAP and EAP-IG: estimates of the effect of every edge from a few passes with gradients.

Both return a `Circuit` of all edges. The score of an edge estimates how much worse the mean metric gets when this edge
alone is ablated, which `exact_effects` computes: metric(full graph) - metric(without the edge), with the opposite sign
for metrics that are worse when larger. So an edge that helps has a positive score, as in ACDC. The score is a sum over
positions and a mean over pairs of

    (what its source writes on the clean prompt - what the ablated edge carries) . d metric / d input of its destination

(with the opposite sign for `kl`). The methods differ in the point at which this derivative is taken. `.keep(n)` makes a
circuit of the n edges with the largest absolute scores.

In the ablated stream the derivative is that of the pass of `model.ablated(position=-1)`. Frozen masks are constants.
With live masks an edge also changes the pass that the gates read, and the derivative passes through the gates'
surrogate weights, as in training. Because a hard mask has the derivative 0 almost everywhere, this only approximates
the effect of units that enter or leave the mask.

Gradients are taken with respect to activations alone; parameters, their `requires_grad` and `.grad` are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from sa_lens.circuits.discovery.gradients_by_hooks import scores_by_hooks
from sa_lens.circuits.discovery.gradients_by_nodes import scores_by_nodes
from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit
from sa_lens.config import check_choice, check_whole
from sa_lens.core.host import Hook

Rule = Literal["left", "right", "midpoint"]
"""Points of EAP-IG, at the share k / steps of the line from the ablated to the clean embedding. `left`: k = 0, ...,
steps - 1 (with the ablated end, without the clean one); `right`: k = 1, ..., steps; `midpoint`: k = 1/2, 3/2, ...,
steps - 1/2."""

SHIFT: dict[Rule, float] = {"left": 0.0, "right": 1.0, "midpoint": 0.5}


@analysis
def eap(exp: Experiment, *, progress: bool = True) -> Circuit:
    """Estimates the effect of every edge by edge attribution patching: from the derivative at the clean prompt.

    Args:
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        A circuit of all edges with their scores. Its `about` holds the settings, and as `value` the metric of the full
        graph.

    Raises:
        ValueError: the metric has no gradient at the clean prompt, as is the case for `kl`.

    Source: Syed et al., arXiv 2310.10348.
    """
    exp.metric.require_gradient(exp.pairs, exp.model.cfg.d_vocab, "eap")
    return estimate_effects(exp, "eap", [1.0], {}, progress=progress)


@analysis
def eap_ig(exp: Experiment, *, steps: int = 5, rule: Rule = "left", progress: bool = True) -> Circuit:
    """Estimates the effect of every edge by integrated gradients: the mean derivative along a line of embeddings.

    The line leads from the embedding that an ablated edge carries (with `resample` that of the corrupt prompt) to that
    of the clean prompt. The rest of each pass is the model's own, and the derivative is multiplied by the same
    difference as in EAP. `kl` has a gradient along this line.

    Args:
        steps: number of points on the line, at least 1.
        rule: which points; see `Rule`. The authors' code uses `left` for edges.
        progress: show a progress bar if it takes more than a few seconds.

    Returns, Raises: as `eap`.

    Source: Hanna et al., arXiv 2403.17806, and the authors' repository (`get_scores_eap_ig`; its scores of nodes take
    the points of `right`).
    """
    check_whole("steps", steps, 1, "5 is usual, more is slower")
    check_choice("rule", rule, Rule)
    points = [(k + SHIFT[rule]) / steps for k in range(steps)]
    at_clean = "eap_ig(steps=1, rule='right')" if points == [1.0] else None
    exp.metric.require_gradient(exp.pairs, exp.model.cfg.d_vocab, at_clean)
    return estimate_effects(exp, "eap-ig", points, {"steps": steps, "rule": rule}, progress=progress)


@torch.inference_mode(False)
def estimate_effects(
    exp: Experiment,
    method: str,
    points: Sequence[float],
    options: dict[str, Any],
    rules: Sequence[Hook] | None = None,
    *,
    progress: bool,
) -> Circuit:
    """Scores every edge with the mean derivative over points of the line of embeddings.

    Args:
        options: further settings of the method, for `about`.
        rules: hooks that change what gradients pass on; None: the model's own gradients.
    """
    total = len(exp.pairs) * len(points)
    with tqdm(total=total, desc=method, unit=" passes", delay=3, disable=not progress) as bar:
        if rules is None and exp.why_not_by_nodes is None:
            scores, value = scores_by_nodes(exp, points, bar.update)
        else:
            scores, value = scores_by_hooks(exp, points, rules or [], bar.update)
    exists = exp.graph.exists
    scores = (exp.metric.sign * scores / total).masked_fill(~exists, torch.nan)
    if not bool(scores[exists].isfinite().all()):
        raise ValueError(
            f"metric={exp.metric.name!r} or its gradient is not finite on these pairs: no score can be given"
        )
    about = {"method": method, **exp.about, **options, "value": value / len(exp.pairs)}
    return Circuit(exp.graph, exists.clone(), scores, about)
