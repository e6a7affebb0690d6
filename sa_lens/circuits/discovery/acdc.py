"""ACDC visits the edges one after the other and removes each whose removal raises the metric by less than tau.

The decisions are those of the plain sequential algorithm:

    value = metric(all edges)
    for edge in order:
        new = metric(without the removed edges and this one)
        if new - value < tau:  remove it; value = new

The order, unless one is given, is the exact reverse of the order of computation: logits first, then layer by layer from
the last, the MLP before the heads, heads from the last index, inputs `v`, `k`, `q`, and for each input its sources from
the last to the embedding. It is fast because of `edge_removals`: edges that can change nothing are removed without a
run, and the others are tried in blocks on the part of the model that they can change.

In wide float32 models, on processors whose bfloat16 products are faster, estimates of the metric decide on removals
that raise it by clearly less than tau. All other decisions, the state that they start from and the value after the
removals are exact, and the size of the error is measured throughout the search (`_screen`).

Source: Conmy et al., arXiv 2304.14997, algorithm 1.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.discovery.eap import eap_ig
from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit, Edge, Graph
from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.circuits.running.removal_state import Block, Row
from sa_lens.circuits.running.whole_removals import WholeRuns
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.freed_memory import return_freed_memory
from sa_lens.core.host import fingerprint_of, hash_of
from sa_lens.stopping import Interrupted

log = logging.getLogger(__name__)

AMBIGUOUS = 1e-6
"""If the rise of the metric is closer than this to tau, the decision may depend on the rounding of float32."""

LIKELY = 1.5
"""The forecast of the time left expects edges to stay whose attribution score (EAP-IG, two steps, 4 pairs) is at least
so many tau. With 1.5 it is right for SmolLM2-135M from the first percent of the edges on."""

MARGIN = 0.25
"""An estimate decides on a removal if the estimated rise is below tau by this part of tau."""

FEW = 32
"""Smallest number of edges for which estimates are worth their preparation."""

TOGETHER = 96
"""Number of removals by estimates after which the exact metric is computed at the latest."""

SAME = 1e-4
"""Largest relative difference between the full graph's metric now and in the search that is resumed."""

STEPS_TO_RETURN = 10
"""Steps after which freed memory is returned; between them it stays for the tensors to come."""

Place = tuple[int, int]
"""(input, source) of an edge."""

_Engine = Recomputation | WholeRuns


@dataclass(frozen=True)
class ACDCResult:
    """The circuit that ACDC finds, with counts of its decisions."""

    circuit: Circuit
    """Kept edges, and after an interruption those that are not visited yet. An edge's score is the rise of the metric
    when it was visited, 0 if it could change nothing, and NaN if it has not been visited. Where an estimate decided on
    the removal, the score is that estimate; the scores of kept edges are always exact."""
    start: float
    """Metric of the full graph; larger is worse (a metric that is better when larger has the opposite sign here)."""
    value: float
    """Metric of the circuit."""
    ambiguous: int
    """Number of decisions whose rise was within 1e-6 of tau, so that other rounding might reverse them."""
    tried: int
    """Number of removals for which the metric was computed."""
    untouched: int
    """Number of edges removed without a run, because no path of remaining edges led from them to the logits."""
    complete: bool
    """Whether every edge was visited; False only in the result of an interrupted search."""
    shortcuts: str
    """`on`, or the reason why every edge was tried."""
    seconds: float
    """Time this call took."""

    def __len__(self) -> int:
        return len(self.circuit)

    @property
    def visited(self) -> int:
        """Number of visited edges."""
        return self.tried + self.untouched


class _State(NamedTuple):
    """The decisions so far. The state is replaced as a whole, so that an interruption never sees half of an update."""

    present: Bool[Tensor, "input source"]
    rises: Float[Tensor, "input source"]
    start: float = math.nan
    value: float = math.nan
    ambiguous: int = 0
    tried: int = 0
    untouched: int = 0


def visiting_order(graph: Graph, seed: int | None = None) -> list[Edge]:
    """The order in which ACDC visits the edges.

    Args:
        seed: None gives the exact reverse of the order of computation. A number shuffles the edges that enter one step
            (the heads of a layer, an MLP, the logits).
    """
    if seed is None:
        return list(reversed(graph.edges))
    generator = torch.Generator().manual_seed(seed)
    order: list[Edge] = []
    for _, step in groupby(reversed(graph.edges), key=lambda edge: graph.sources_before(edge.destination)):
        edges = list(step)
        order += [edges[i] for i in torch.randperm(len(edges), generator=generator).tolist()]
    return order


@analysis
def acdc(
    exp: Experiment,
    tau: float = 0.01,
    *,
    order: Sequence[Edge | str] | None = None,
    resume: ACDCResult | Circuit | None = None,
    progress: bool = True,
) -> ACDCResult:
    """Finds a circuit by ACDC: removes each edge whose removal makes the metric worse by less than tau.

    The usual metric is `kl`: KL(unedited clean prompt || edited), full vocabulary, mean over pairs, in the same stream.
    With another metric, tau limits how much worse its mean gets. With live masks nearly every edge is tried, as
    each may change which units stay.

    Args:
        tau: an edge stays if its removal makes the metric worse by tau or more; nats for `kl`.
        order: all edges, in the order in which they are visited; None takes `visiting_order(graph)`. If an order visits
            a destination before one of a later step, the search does without shortcuts and a warning says so.
        resume: the result of an interrupted search, or its circuit read from disk. Weights, prompts and arguments must
            be the same.
        progress: whether to show a bar with the remaining edges and time.

    Raises:
        ValueError: tau is below 0, the order does not name every edge once, `resume` belongs to another search, or the
            metric is not finite.
        Interrupted: Ctrl-C stopped the search; the exception's `result` can be resumed.
    """
    began = perf_counter()
    if not (tau >= 0 and math.isfinite(tau)):
        raise ValueError(f"tau={tau} must be 0 or more, and finite: it is the rise of the metric that keeps an edge")
    exp = exp.fill_in(metric="kl")
    graph = exp.graph
    edges = visiting_order(graph) if order is None else list(order)
    places = [graph.place(edge) for edge in edges]
    if len(places) != len(graph) or len(set(places)) != len(graph):
        raise ValueError(
            f"order names {len(set(places))} different edges in {len(places)} entries: it must hold each of the "
            f"graph's {len(graph)} edges once"
        )
    about: dict[str, Any] = {
        **{"method": "acdc", **exp.about, "tau": tau},
        "order": "reverse" if order is None else hashlib.sha256(repr(places).encode()).hexdigest()[:16],
        **{"weights": fingerprint_of(exp.model, exp.stream), "prompts": _hash_of_prompts(exp.pairs)},
    }
    state = _initial_state(graph, about, resume)
    why_not = _why_no_shortcuts(exp, places, tau)
    if why_not is not None:
        log.log(exp.level_of_slow_runs, "ACDC without shortcuts: %s", why_not)
    search = _Search(exp, tau, state, progress)
    stop: KeyboardInterrupt | None = None
    with torch.inference_mode(), search.bar():
        try:
            if why_not is None:
                engine = Recomputation(exp, state.present)
                search.start(engine)
                _step_by_step(search, places, engine)
            else:
                runs = WholeRuns(exp, state.present)
                search.start(runs)
                runs.circuits.keep_only(state.present)
                _decide(search, search.select_undecided(places), runs)
        except KeyboardInterrupt as asked:
            stop = asked
    state = search.state
    counts: dict[str, Any] = dict(zip(_State._fields[2:], state[2:], strict=True))
    complete = stop is None
    # copies: tensors made in inference mode could not be written to by others
    circuit = Circuit(graph, state.present.clone(), state.rises.clone(), {**about, **counts, "complete": complete})
    result = ACDCResult(
        circuit=circuit,
        **counts,
        complete=complete,
        shortcuts=why_not or "on",
        seconds=perf_counter() - began,
    )
    if stop is not None:
        raise Interrupted(
            f"stopped after {result.visited:,} of {len(graph):,} edges; the exception's `result` holds what is "
            "decided. Go on with acdc(..., resume=result)",
            result=result,
        ) from stop
    return result


def _why_no_shortcuts(exp: Experiment, places: list[Place], tau: float) -> str | None:
    """Returns why every edge must be tried, or None if some need no run."""
    steps = [exp.graph.n_sources[to] for to, _ in places]
    if any(later > earlier for earlier, later in pairwise(steps)):
        return "the order visits a destination before one of a later step"
    if tau == 0:
        return "at tau=0 an edge that changes nothing is kept"
    return exp.why_not_in_part


_HASHED = {"weights": "weights or gates", "prompts": "prompts or answers"}
"""Explains the two settings that are stored as hashes."""


def _hash_of_prompts(pairs: PromptPairs) -> str:
    names = ("clean", "corrupt", "answers", "wrong_answers", "lengths")
    return hash_of((name, getattr(pairs, name).long()) for name in names)


def _initial_state(graph: Graph, about: dict[str, Any], resume: ACDCResult | Circuit | None) -> _State:
    if resume is None:
        rises = torch.full(graph.exists.shape, torch.nan, dtype=torch.float64)
        return _State(graph.exists.clone(), rises)
    circuit = resume.circuit if isinstance(resume, ACDCResult) else resume
    if circuit.graph != graph:
        raise ValueError(
            f"resume= belongs to another search: its graph is {circuit.graph}, here it is {graph}. Give a model of the "
            "same shape, or start a new search"
        )
    for name, value in about.items():
        before = circuit.about.get(name)
        if before != value:
            differs = f"its {name} is {before!r}, here it is {value!r}"
            if name in _HASHED:
                differs = f"it was made with other {_HASHED[name]}"
            raise ValueError(f"resume= belongs to another search: {differs}. Give the same model, pairs and arguments")
    counts = [circuit.about[name] for name in _State._fields[2:]]
    return _State(circuit.mask.clone(), circuit.scores.clone(), *counts)


class _Search:
    """The decisions of a search so far, and the progress bar that shows them."""

    def __init__(self, exp: Experiment, tau: float, state: _State, progress: bool) -> None:
        self.exp, self.graph, self.tau, self.state, self.progress = exp, exp.graph, tau, state, progress
        self._bar: Any = None
        self._engine: _Engine | None = None
        self._began = self._shown = 0.0
        self._tried_before = state.tried
        self._rows = 0
        self._left: dict[str, str] = {}

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Shows the bar. Its time left is the forecast; the mean time per edge, which tqdm would show, says nothing."""
        done = int((~self.state.rises.isnan()).sum())
        with tqdm(
            total=len(self.graph),
            initial=done,
            desc="ACDC",
            mininterval=0.5,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=not self.progress,
        ) as self._bar:
            self._show()
            yield

    def _kept(self) -> int:
        return int((self.state.present & ~self.state.rises.isnan()).sum())

    def _show(self) -> None:
        if self.progress:
            self._bar.set_postfix(left=self._bar.total - self._bar.n, kept=self._kept(), **self._left, refresh=False)

    def forecast(self) -> float:
        """Returns the seconds that the rest is expected to take; NaN as long as it is not known."""
        tried = self.state.tried - self._tried_before
        if self._engine is None or not self._engine.work or not tried or self._likely is None:
            return math.nan
        left = self._engine.work_left(~self.state.rises.isnan(), self._likely) * self._rows / tried
        return left * (perf_counter() - self._began) / self._engine.work

    @cached_property
    def _likely(self) -> Bool[Tensor, "input source"] | None:
        """Edges that are likely to stay: those of a large attribution score; None if the metric has no gradient."""
        if isinstance(self._engine, WholeRuns):
            return self.graph.exists
        began = perf_counter()
        try:
            scores = eap_ig(self.exp.on_few(4), steps=2, progress=False).scores
        except ValueError:
            return None
        finally:
            self._began += perf_counter() - began
        return scores.nan_to_num(0.0).abs() >= LIKELY * self.tau

    def start(self, engine: _Engine) -> None:
        """Records the metric of the full graph, or checks that it is the same as in the search that is resumed.

        Raises:
            ValueError: the metric is not finite, or differs from that of the resumed search.
        """
        self._engine = engine
        start, before = engine.value(), self.state.start
        _check_finite(start)
        if math.isnan(before):
            self.state = self.state._replace(start=start, value=start)
        elif abs(start - before) > SAME * max(1.0, abs(before)):
            raise ValueError(
                f"resume= belongs to another search: its metric of the full graph is {before:.6g}, here it is "
                f"{start:.6g}. Give the same metric, or start a new search"
            )
        self._began = perf_counter()

    def try_removals(self, rows: Sequence[Row]) -> Block:
        """Returns the metric after each removal of a block."""
        assert self._engine is not None
        self._rows += len(rows)
        return self._engine.try_removals(rows)

    def estimate(self, removed: Sequence[Place], places: Sequence[Place]) -> list[float]:
        """Returns about the metric after removal of each edge, in addition to those before it and to others."""
        assert isinstance(self._engine, Recomputation)
        self._rows += len(places)
        return self._engine.estimate([Row([*removed, places[0]]), *(Row([place]) for place in places[1:])])

    def remove(self, places: Sequence[Place], costs: Sequence[float], error: float) -> bool:
        """Removes edges together, unless the metric then differs by more than `error` from what was estimated.

        Args:
            costs: estimates of the metric before the first removal and after each.

        Returns:
            Whether the edges are removed.
        """
        assert self._engine is not None
        block = self.try_removals([Row(places)])
        value = block.costs[0]
        if not abs(value - costs[-1]) <= error:
            return False
        self._engine.accept(block, 0, [0])
        self.commit(places, [after - before for before, after in pairwise(costs)], [True] * len(places), value)
        return True

    def select_undecided(self, places: Sequence[Place]) -> list[Place]:
        """Returns the edges that are not visited yet, in order."""
        rises = self.state.rises
        return [place for place in places if math.isnan(rises[place])]

    def commit(self, places: Sequence[Place], rises: Sequence[float], removed: Sequence[bool], value: float) -> None:
        """Records the decisions on edges whose removal was tried."""
        near = sum(abs(rise - self.tau) <= AMBIGUOUS for rise in rises)
        self._record(places, rises, removed, value, ambiguous=near, tried=len(places))

    def discard(self, places: Sequence[Place]) -> None:
        """Removes edges that can change nothing."""
        n = len(places)
        self._record(places, [0.0] * n, [True] * n, self.state.value, untouched=n)

    def _record(
        self,
        places: Sequence[Place],
        rises: Sequence[float],
        removed: Sequence[bool],
        value: float,
        **counts: int,
    ) -> None:
        if not places:
            return
        state = self.state
        to, source = torch.tensor(places).T
        present, visited = state.present.clone(), state.rises.clone()
        present[to, source] = ~torch.tensor(removed)
        visited[to, source] = torch.tensor(rises, dtype=torch.float64)
        added = {name: getattr(state, name) + n for name, n in counts.items()}
        self.state = state._replace(present=present, rises=visited, value=value, **added)
        self._bar.update(len(places))
        # the first forecast needs a pass with gradients, for which a short search does not wait
        now = perf_counter()
        if self.progress and now - self._shown > 1 and now - self._began > 3:
            self._shown, left = now, self.forecast()
            self._left = {} if math.isnan(left) else {"time": f"about {tqdm.format_interval(left)} left"}
        self._show()


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"the metric is {value}: ACDC needs a finite one at every step")


def _step_by_step(search: _Search, places: list[Place], engine: Recomputation) -> None:
    """Decides step by step, after edges into nodes without a path to the logits are removed without a run."""
    graph = search.graph
    for turn, (_, group) in enumerate(groupby(places, key=lambda place: graph.n_sources[place[0]])):
        if turn % STEPS_TO_RETURN == 0:
            return_freed_memory()
        step = list(group)
        left = search.select_undecided(step)
        live = engine.enter(step, compute=bool(left))
        dead = [place for place in left if graph.inputs[place[0]].node not in live]
        engine.drop(dead)
        search.discard(dead)
        queue = [place for place in left if graph.inputs[place[0]].node in live]
        decide = _decide if engine.rounded_to is None or len(queue) < FEW else _screen
        decide(search, queue, engine)


def _screen(search: _Search, queue: list[Place], engine: Recomputation) -> None:
    """Decides on edges, on most of them by estimates of the metric.

    A removal is accepted if its estimated rise is below tau by a margin; all others are decided by the exact metric.
    Accepted removals that follow each other are made together and exactly, which shows how far their estimates are off.
    If that is more than a fifth of the margin, the exact metric decides on each of them too.
    """
    limit, done = (1 - MARGIN) * search.tau, 0
    doubtful: set[Place] = set()
    n_exact = 1
    while done < len(queue):
        accepted: list[Place] = []
        costs = [search.state.value]
        while len(accepted) < TOGETHER:
            first = done + len(accepted)
            size = max(engine.largest_block // 2, min(engine.largest_block, len(accepted)))
            places = list(takewhile(lambda place: place not in doubtful, queue[first : first + size]))
            if not places:
                break
            estimates = search.estimate(accepted, places)
            rises = [cost - before for before, cost in pairwise([costs[-1], *estimates])]
            doubtful.update(place for place, rise in zip(places, rises, strict=True) if not rise < limit)
            clear = list(takewhile(lambda place: place not in doubtful, places))
            accepted += clear
            costs += estimates[: len(clear)]
        if accepted and not search.remove(accepted, costs, MARGIN * search.tau / 5):
            _decide(search, accepted, engine)
        done += len(accepted)
        if len(accepted) < TOGETHER:
            # where many edges stay, estimates of the edges after them are wasted
            n_exact = 1 if len(accepted) >= engine.largest_block // 2 else 2 * n_exact
            _decide(search, queue[done : done + n_exact], engine)
            done += n_exact


def _decide(search: _Search, queue: list[Place], engine: _Engine) -> None:
    """Decides on edges, block by block.

    A block guesses which of its edges are removed. Each row builds on the guesses before it, so its decision is that of
    the sequential algorithm as long as these guesses were right. Rows after the first wrong guess only serve as new
    guesses.
    """
    stays: set[Place] = set()
    largest = engine.largest_block
    size = min(8, largest)
    done = 0
    while done < len(queue):
        places = queue[done : done + size]
        rows = [Row([place], place not in stays) for place in places]
        block = search.try_removals(rows)
        value = search.state.value
        rises: list[float] = []
        removed: list[int] = []
        for r, (row, cost) in enumerate(zip(rows, block.costs, strict=True)):
            _check_finite(cost)
            rises.append(cost - value)
            goes = rises[-1] < search.tau
            if goes:
                removed.append(r)
                value = cost
            if goes != row.stays_out:
                break
        n = len(rises)
        if removed:
            engine.accept(block, removed[-1], removed)
        search.commit(places[:n], rises, [r in removed for r in range(n)], value)
        done += n
        before = block.costs[n - 1] if rows[n - 1].stays_out else value
        for place, row, cost in zip(places[n:], rows[n:], block.costs[n:], strict=True):
            (stays.add if cost - before >= search.tau else stays.discard)(place)
            before = cost if row.stays_out else before
        size = min(largest, 2 * size if n == len(rows) else max(4, min(size, 2 * n)))
