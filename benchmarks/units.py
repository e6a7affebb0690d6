"""Measures the speed of `specialization`, and of its forward pass without and with hooks, with the preset `laptop`.

    python benchmarks/units.py                               # 100,000 tokens, scaled to 5 million
    python benchmarks/units.py --tokens 500000 --json units.json
    python benchmarks/units.py --threads 1                   # on a shared machine: then compare CPU times

Both passes run on the same model and tokens in turns, batch by batch, in this process. Times are wall-clock times and,
because other programs may share the machine, CPU times of the process. Weights and tokens are random. The cost is the
same for a trained model and real text.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sa_lens as sa
from sa_lens.config import PRESETS
from sa_lens.core.host import streams_of
from sa_lens.core.unit import unit_counts
from sa_lens.units import calibrate, specialization
from sa_lens.units.activations import TOKENS_AT_ONCE, read_by_hooks, read_units

GOAL = 5_000_000
"""Number of tokens to which times are scaled."""
COACTIVATION_TOKENS = 500_000
"""Number of tokens on which `specialization` counts pairs of units that fire together."""


class Clock:
    """Measures wall-clock seconds and CPU seconds of this process."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def time(self, action: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        done = action()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return done


def passes(model: Any, blocks: torch.Tensor) -> dict[str, Clock]:
    """Measures both forward passes over the same batches in turns; the first batch is not counted."""
    sites, streams = list(unit_counts(model)), streams_of(model)
    batch = max(1, TOKENS_AT_ONCE["cpu"] // blocks.shape[1])
    readers = {"with hooks": read_by_hooks, "without hooks": read_units}
    clocks = {name: Clock() for name in readers}
    for batch_index, tokens in enumerate(blocks.split(batch)):
        for name, read in readers.items():
            clock = clocks[name] if batch_index else Clock()
            clock.time(lambda read=read, tokens=tokens: read(model, tokens, streams, sites))
    return clocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="number of tokens of the whole measurement")
    parser.add_argument("--pass-tokens", type=int, default=40_000, help="number of tokens of the forward passes alone")
    parser.add_argument("--scope", choices=("local", "global", "both"), default="local")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    logging.getLogger().setLevel(logging.ERROR)

    preset = PRESETS["laptop"]
    words = preset.data.vocab_size
    shape = {name: value for name, value in vars(preset.model).items() if name != "d_vocab"}
    gates = {**vars(preset.gates), "scope": options.scope}
    model = sa.SelfAblatingTransformer(
        sa.ModelConfig(**shape, d_vocab=words), sa.GateConfig(**gates), seed=0, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    n_ctx = model.cfg.n_ctx
    blocks = torch.randint(words, (max(16, options.tokens // n_ctx), n_ctx), generator=generator)

    timed = blocks[: max(8, options.pass_tokens // n_ctx)]
    clocks = passes(model, timed)
    rules = calibrate(model, blocks[:8], streams_of(model), progress=False)
    clocks["specialization"] = Clock()
    pairs = max(1, COACTIVATION_TOKENS * blocks.numel() // GOAL)  # the same share of the text as at the goal
    clocks["specialization"].time(
        lambda: specialization(model, blocks, rules, coactivation_tokens=pairs, progress=False)
    )
    n_pass = timed.numel() - max(1, TOKENS_AT_ONCE["cpu"] // n_ctx) * n_ctx
    rows = []
    for name, clock in clocks.items():
        n = blocks.numel() if name == "specialization" else n_pass
        rows.append(
            {
                "what": name,
                "tokens": n,
                "microseconds per token": 1e6 * clock.wall / n,
                "CPU microseconds per token": 1e6 * clock.cpu / n,
                "minutes for 5 million": GOAL / n * clock.wall / 60,
            }
        )
    print(f"{options.scope} gates, {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, n_ctx {n_ctx}, ", end="")
    print(f"{words:,} words, {options.threads} threads\n")
    print("| what | tokens | µs per token | CPU µs per token | minutes for 5 million |\n|---|---|---|---|---|")
    for row in rows:
        print("| {} | {:,} | {:.1f} | {:.1f} | {:.1f} |".format(*row.values()))
    before, after = clocks["with hooks"], clocks["without hooks"]
    print(f"\nwithout hooks: {before.wall / after.wall:.2f} times as fast by the clock, ", end="")
    print(f"{before.cpu / after.cpu:.2f} by CPU time")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
