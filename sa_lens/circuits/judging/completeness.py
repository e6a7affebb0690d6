"""Completeness and minimality: does a circuit hold all edges that matter, and no others?

Let F be the mean metric over the prompts, C the circuit, M the whole model.

- Completeness: when any part K is removed from both, circuit and model should still agree, so that
  |F(C without K) - F(M without K)| is small. A backup that the circuit lacks shows once K holds what it replaces.
- Minimality: each edge (or node) of the circuit should matter, so that F(C) - F(C without it) is not small.

Source: Wang et al., arXiv 2211.00593, section 4. Differs: minimality removes each element from the whole circuit
instead of from one chosen by hand, and elements may be edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit, Graph, Node
from sa_lens.circuits.judging.circuit_metric import CircuitMetric
from sa_lens.config import check_choice, check_whole
from sa_lens.statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

Elements = Literal["edges", "nodes"]
"""What is removed: single edges, or heads and MLPs with all their edges."""


class _Element(NamedTuple):
    name: str
    mask: Bool[Tensor, "input source"]
    """The edges that are removed with it, in the whole graph."""


SHARE = 0.5
"""Probability with which each element of the circuit is in a random set."""


@analysis
def completeness(
    exp: Experiment,
    circuit: Circuit,
    *,
    by: Elements = "edges",
    subsets: int = 10,
    steps: int = 5,
    candidates: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures how much circuit and model differ when the same elements of the circuit are removed from both.

    Args:
        by: what an element is; see `Elements`.
        subsets: number of random sets K; each element of the circuit is in K with probability 0.5.
        steps: number of steps of a greedy search for a bad K. Each step tries `candidates` random elements and adds the
            one after which circuit and model differ most. The row holds the worst of these sets. The search costs up to
            2 * steps * candidates runs; 0 leaves it out.
        candidates: number of elements that are tried at each step.
        progress: whether to show a progress bar if it takes more than a few seconds.

    Returns:
        One row per set: how (`none` for the empty K, `random`, `greedy`), removed (number of elements), circuit_value
        F(C without K), model_value F(M without K), incompleteness (their absolute difference), normalised (the
        difference over |m(clean) - m(empty)|), elements (their names), and the settings.

    Raises:
        ValueError: the circuit is empty, an option is out of range, and what `faithfulness` raises.
    """
    import pandas as pd

    for name, value, least in (("subsets", subsets, 0), ("steps", steps, 0), ("candidates", candidates, 1)):
        check_whole(name, value, least)
    elements = _elements(circuit, by, exp.graph)
    measure = CircuitMetric.of(exp)
    generator = torch.Generator().manual_seed(exp.seed)
    whole = measure.graph.exists

    def values(chosen: tuple[int, ...]) -> tuple[float, float]:
        out = _union([elements[i] for i in chosen], whole)
        return tuple(float(measure(mask & ~out).value.mean()) for mask in (circuit.mask, whole))  # type: ignore

    def difference(chosen: tuple[int, ...]) -> float:
        in_circuit, in_model = values(chosen)
        return abs(in_circuit - in_model)

    def search(bar: tqdm[Any]) -> tuple[int, ...]:
        taken: tuple[int, ...] = ()
        worst, worst_by = taken, -math.inf
        for _ in range(min(steps, len(elements))):
            free = torch.tensor([i for i in range(len(elements)) if i not in taken])
            tried = free[torch.randperm(len(free), generator=generator)[:candidates]].tolist()
            sizes = []
            for i in tried:
                sizes.append(difference((*taken, i)))
                bar.update()
            taken = (*taken, tried[max(range(len(tried)), key=sizes.__getitem__)])
            if max(sizes) > worst_by:
                worst, worst_by = taken, max(sizes)
        return worst

    def sets(bar: tqdm[Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "none", ()
        for _ in range(subsets):
            drawn = torch.rand(len(elements), generator=generator) < SHARE
            bar.update()
            yield "random", tuple(drawn.nonzero()[:, 0].tolist())
        if steps:
            yield "greedy", search(bar)

    rows = []
    with tqdm(desc="completeness", delay=3, disable=not progress) as bar:
        for how, chosen in sets(bar):
            in_circuit, in_model = values(chosen)
            rows.append(
                {
                    **{"how": how, "removed": len(chosen), "circuit_value": in_circuit, "model_value": in_model},
                    "incompleteness": abs(in_circuit - in_model),
                    "normalised": abs(in_circuit - in_model) / abs(measure.gap),
                    "elements": ", ".join(elements[i].name for i in sorted(chosen)),
                    **{"by": by, "edges": len(circuit), **measure.about},
                }
            )
    return pd.DataFrame(rows)


@analysis
def minimality(exp: Experiment, circuit: Circuit, *, by: Elements = "edges", progress: bool = True) -> pd.DataFrame:
    """Measures how much each element contributes to a circuit, with one run per element.

    Args:
        by: what an element is; see `Elements`.
        progress: whether to show a progress bar if it takes more than a few seconds.

    Returns:
        One row per element, largest effect first: element, without (F of the circuit without it), change (F of the
        circuit minus `without`) with its 95 % interval over prompts `_low` and `_high`, normalised (change over
        m(clean) - m(empty), so that elements that help have positive values), circuit_value, and the settings.

    Raises:
        ValueError: the circuit is empty, a choice is unknown, and what `faithfulness` raises.
    """
    import pandas as pd

    elements = _elements(circuit, by, exp.graph)
    measure = CircuitMetric.of(exp)
    before = measure(circuit.mask).value
    rows = []
    for element in tqdm(elements, desc="minimality", delay=3, disable=not progress):
        after = measure(circuit.mask & ~element.mask).value
        change = bootstrap_interval(before - after, seed=exp.seed)
        rows.append(
            {
                **{"element": element.name, "without": float(after.mean())},
                **change.columns("change"),
                "normalised": change.mean / measure.gap,
                **{"circuit_value": float(before.mean()), "by": by, "edges": len(circuit), **measure.about},
            }
        )
    table = pd.DataFrame(rows)
    order = table["change"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _elements(circuit: Circuit, by: str, graph: Graph) -> list[_Element]:
    """Returns the elements of the circuit in the order of computation."""
    check_choice("by", by, Elements)
    circuit.check_fits(graph)
    elements = []
    if by == "edges":
        for to, source in circuit.mask.nonzero().tolist():
            mask = torch.zeros_like(graph.exists)
            mask[to, source] = True
            elements.append(_Element(str(graph.edge(to, source)), mask))
    else:
        elements = [_Element(str(n), _edges_of(n, graph)) for n in circuit.nodes if n.kind in ("head", "mlp")]
    if not elements:
        raise ValueError(f"the circuit has no {by} to take out")
    return elements


def _edges_of(node: Node, graph: Graph) -> Bool[Tensor, "input source"]:
    """Returns all edges into and out of a head or MLP."""
    mask = torch.zeros_like(graph.exists)
    mask[:, graph.source_index[node]] = True
    mask[graph.inputs_of[node]] = True
    return mask & graph.exists


def _union(elements: list[_Element], like: Tensor) -> Bool[Tensor, "input source"]:
    mask = torch.zeros_like(like)
    for element in elements:
        mask |= element.mask
    return mask
