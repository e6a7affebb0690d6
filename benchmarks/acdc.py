"""Measures how much faster ACDC is than the plain sequential algorithm, on models with random weights.

    python benchmarks/acdc.py                        # three sizes, then how cost grows
    python benchmarks/acdc.py --sizes small --twin-edges 310 --json acdc.json
    python benchmarks/acdc.py --threads 1            # on a shared machine: then compare CPU times

The plain algorithm, the *twin*, is in `tests/circuits/twins.py`: for each edge it runs one ordinary pass of the whole
model with hooks. Both run on the same model, pairs, order and threads, one after the other in this process. Where the
twin would take too long, it visits only the first edges of the order (`--twin-edges`), and its decisions on these edges
are compared. Times are wall-clock times and, because other programs may share the machine, CPU times of the process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "circuits"))

from micro import token_pairs
from twins import SlowRuns, slow_acdc

from sa_lens.circuits.discovery.acdc import AMBIGUOUS, acdc, visiting_order
from sa_lens.core import HookedTransformer, HookedTransformerConfig


@dataclass(frozen=True)
class Size:
    """A model with random weights, and pairs of random tokens."""

    name: str
    layers: int
    heads: int
    vocabulary: int
    prompts: int
    spread: float
    """Standard deviation of the initial weights, which determines how many edges are kept."""
    tokens: int = 16
    d_model: int = 128


SIZES = [
    Size("small", 2, 8, 4_096, 16, 0.13),
    Size("medium", 4, 16, 50_257, 32, 0.18),
    Size("large", 8, 16, 50_257, 64, 0.15),
]
MIDDLE = Size("growth", 4, 8, 8_192, 32, 0.15)
GROWTH = [
    *(replace(MIDDLE, layers=n, name=f"layers={n}") for n in (2, 4, 8)),
    *(replace(MIDDLE, heads=n, name=f"heads={n}") for n in (4, 8, 16)),
    *(replace(MIDDLE, prompts=n, name=f"prompts={n}") for n in (16, 32, 64)),
]


def build(size: Size) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=size.layers,
        n_heads=size.heads,
        d_model=size.d_model,
        d_head=size.d_model // size.heads,
        d_vocab=size.vocabulary,
        n_ctx=64,
        act_fn="gelu_new",
        normalization_type="LN",
        initializer_range=size.spread,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return HookedTransformer(cfg)


class Clock:
    """Wall-clock and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def measure(size: Size, tau: float, repeats: int, twin_edges: int) -> dict[str, Any]:
    """Returns a row of the table: the fastest of `repeats` runs, and the twin on the first `twin_edges` edges."""
    model = build(size)
    pairs = token_pairs(size.prompts, (size.tokens,), size.vocabulary, differ=size.tokens - 2)
    times = []
    for _ in range(repeats):
        clock = Clock()
        result = acdc(model, pairs, tau, progress=False)
        times.append(clock.read())
    wall, cpu = min(times)
    edges = len(result.circuit.graph)
    row: dict[str, Any] = {
        **asdict(size),
        **{"tau": tau, "edges": edges, "kept": len(result), "tried": result.tried, "ambiguous": result.ambiguous},
        **{
            "seconds": wall,
            "cpu_seconds": cpu,
            "ms_per_edge": 1e3 * wall / edges,
            "cpu_ms_per_edge": 1e3 * cpu / edges,
        },
    }
    if twin_edges:
        order = visiting_order(result.circuit.graph)[:twin_edges]
        device = next(model.parameters()).device
        clock = Clock()
        runs = SlowRuns(model, pairs.clean.to(device), pairs.corrupt.to(device))
        kept, rises = slow_acdc(order, runs.kl, tau)
        wall, cpu = clock.read()
        differ = [e for e in order if (e in kept) != (e in result.circuit) and abs(rises[e] - tau) > AMBIGUOUS]
        row |= {
            **{"twin_edges": len(order), "twin_ms_per_edge": 1e3 * wall / len(order)},
            **{"twin_cpu_ms_per_edge": 1e3 * cpu / len(order), "decisions_that_differ": len(differ)},
        }
        row["times_faster"] = row["twin_ms_per_edge"] / row["ms_per_edge"]
        row["times_less_cpu"] = row["twin_cpu_ms_per_edge"] / row["cpu_ms_per_edge"]
    return row


def show(row: dict[str, Any]) -> str:
    text = (
        f"{row['name']:>11}: {row['edges']:6} edges, {row['kept']:4} kept, {row['tried']:5} tried; "
        f"{row['seconds']:7.2f} s, {row['ms_per_edge']:6.3f} ms per edge (CPU {row['cpu_ms_per_edge']:.3f})"
    )
    if "twin_edges" in row:
        text += (
            f"; twin {row['twin_ms_per_edge']:.1f} ms (CPU {row['twin_cpu_ms_per_edge']:.1f}) over {row['twin_edges']} "
            f"edges: {row['times_faster']:.0f}x, CPU {row['times_less_cpu']:.0f}x, "
            f"{row['decisions_that_differ']} decisions differ"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [s.name for s in (*SIZES, *GROWTH)]
    parser.add_argument(
        "--sizes", nargs="*", choices=names, metavar="NAME", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument("--tau", type=float, default=0.01, help="nats")
    parser.add_argument("--repeats", type=int, default=2, help="number of runs, of which the fastest counts")
    parser.add_argument("--twin-edges", type=int, default=200, help="number of edges that the twin visits; 0: no twin")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the table")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    logging.disable(logging.WARNING)
    rows = []
    for size in (*SIZES, *GROWTH):
        if chosen.sizes is None or size.name in chosen.sizes:
            rows.append(measure(size, chosen.tau, chosen.repeats, chosen.twin_edges))
            print(show(rows[-1]), flush=True)
    if chosen.json is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        conditions = {"threads": chosen.threads, "torch": torch.__version__, "device": device}
        chosen.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
