"""Measures analyses of circuits on a real pretrained model: SmolLM2-135M-Instruct, whose graph has 123,211 edges.

    python benchmarks/circuits.py                       # all of them; ACDC takes minutes, with live gates an hour
    python benchmarks/circuits.py --only curve exact    # some
    python benchmarks/circuits.py --only acdc --minutes 2   # the first two minutes, with the forecast of the rest

The prompts are pairs of indirect-object identification in words that this model knows. Wall-clock time, processor time
of all threads, and the peak memory of the process so far are printed after each. `real_model.py` says where the model
comes from.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from real_model import gguf_file

import sa_lens as sa
from sa_lens import circuits, views


def acdc(exp: circuits.Experiment, minutes: float | None) -> str:
    """ACDC at tau 0.01; its bar shows the forecast."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))
    try:
        found = circuits.acdc(exp, 0.01)
    except KeyboardInterrupt as stopped:
        found = stopped.result  # type: ignore[attr-defined]
    signal.setitimer(signal.ITIMER_REAL, 0)
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
