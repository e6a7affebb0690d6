"""Measures analyses of circuits on a real pretrained model: SmolLM2-135M-Instruct, whose graph has 123,211 edges.

    python benchmarks/circuits.py                       # all of them; ACDC takes minutes, with live gates an hour
    python benchmarks/circuits.py --only curve exact    # some
    python benchmarks/circuits.py --only acdc --minutes 2   # the first two minutes, with the forecast of the rest

The prompts are pairs of indirect-object identification in words that this model knows. Wall-clock time, processor time
of all threads, and the peak memory of the process so far are printed after each. After a whole search of ACDC, the line
before says how its forecasts compare with the time that was left. `real_model.py` says where the model comes from.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from real_model import gguf_file

import sa_lens as sa
from sa_lens import circuits, views
from sa_lens.circuits.discovery.acdc import _Search

LAST = 30
"""Seconds before the end of a search in which its forecasts are not compared."""


class Forecast(NamedTuple):
    """What the bar of ACDC said."""

    visited: float
    """Share of the edges that were visited."""
    now: float
    """Wall-clock time in seconds."""
    left: float
    """Seconds that the rest was expected to take; NaN if this was not known yet."""


@contextmanager
def noted_forecasts() -> Iterator[list[Forecast]]:
    """Collects the forecasts of ACDC within the context."""
    forecasts: list[Forecast] = []
    forecast = _Search.forecast

    def noted(search: _Search) -> float:
        left = forecast(search)
        visited = 1 - float(search.state.rises[search.graph.exists].isnan().double().mean())
        forecasts.append(Forecast(visited, time.perf_counter(), left))
        return left

    with mock.patch.object(_Search, "forecast", noted):
        yield forecasts


def compare_forecasts(forecasts: list[Forecast], end: float) -> str:
    """Says how many times the time that was left the forecasts were, by the share of the edges that were visited.

    Args:
        end: wall-clock time when the search was complete.
    """
    ratios = {x.visited: x.left / (end - x.now) for x in forecasts if x.left > 0 and end - x.now > LAST}
    tenths = dict.fromkeys(next((share for share in ratios if share >= n / 10), None) for n in range(1, 10))
    factors = {share: max(ratio, 1 / ratio) for share, ratio in ratios.items() if share >= 0.1}
    if not factors:
        return f"no forecasts more than {LAST} s before the end"
    said = ", ".join(f"{ratios[share]:.2f} at {share:.0%}" for share in tenths if share)
    worst = max(factors, key=factors.__getitem__)
    return (
        f"forecast over time left: {said} of the edges; between a tenth of them and {LAST} s before the end at most a "
        f"factor of {factors[worst]:.2f}, at {worst:.0%}"
    )


def acdc(exp: circuits.Experiment, minutes: float | None) -> str:
    """ACDC at tau 0.01; its bar shows the forecast."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))
    with noted_forecasts() as forecasts:
        try:
            found = circuits.acdc(exp, 0.01)
        except KeyboardInterrupt as stopped:
            found = stopped.result  # type: ignore[attr-defined]
    end = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if found.complete:
        print(compare_forecasts(forecasts, end), flush=True)
    return f"{found.visited:,} edges visited, {found.tried:,} tried, {int(found.circuit.mask.sum()):,} not removed"


def draw(circuit: circuits.Circuit) -> str:
    """Draws a circuit into a page."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "circuit.html"
        views.save(views.circuit_map(circuit), page)
        return f"{len(circuit)} edges, a page of {page.stat().st_size / 1e3:.0f} kB"


def main() -> None:
    names = ("eap-ig", "curve", "exact", "patch", "draw", "acdc", "acdc-live")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--minutes", type=float, help="stop ACDC after so many minutes")
    parser.add_argument("--model", help="folder of this model with trained gates; without it they are random")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    logging.disable(logging.WARNING)
    model = (
        sa.SelfAblatingTransformer.from_pretrained(chosen.model)
        if chosen.model
        else sa.SelfAblatingTransformer.from_hugging_face(gguf_file(), sa.GateConfig(k_attn=64, k_mlp=192))
    )
    pairs = circuits.tasks.ioi(model.tokenizer, chosen.pairs, words="tinystories")
    even = circuits.tasks.ioi(model.tokenizer, 8 * chosen.pairs, words="tinystories")
    even = even.subset((even.lengths == even.lengths[0]).nonzero()[:8, 0])
    exp = circuits.Experiment(model, pairs)

    @cache
    def ranking() -> circuits.Circuit:
        return circuits.eap_ig(exp, steps=3, progress=False)

    analyses: dict[str, Callable[[], Any]] = {
        "eap-ig": lambda: f"{len(circuits.eap_ig(exp, steps=3))} edges",
        "curve": lambda: f"{len(circuits.faithfulness(exp, ranking(), order='absolute', levels=()).points)} points",
        "exact": lambda: f"{len(circuits.exact_effects(exp, ranking().keep(500)))} edges",
        "patch": lambda: f"{len(circuits.patch(exp.on(even), 'heads', positions='each'))} patches, {len(even)} pairs",
        "draw": lambda: draw(ranking().keep(200)),
        "acdc": lambda: acdc(exp, chosen.minutes),
        "acdc-live": lambda: acdc(exp.replace(stream="ablated", masks="live"), chosen.minutes),
    }
    for name in chosen.only:
        if name in ("curve", "exact", "draw"):
            ranking()  # not a part of what is timed
        wall, cpu = time.perf_counter(), time.process_time()
        said = analyses[name]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{name}: {said}; {wall:.1f} s, {cpu:.1f} s of processor time, peak {peak:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
