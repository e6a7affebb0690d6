"""Compares the speed of the forward pass of sa_lens's decoder with that of TransformerLens 3's HookedTransformer.

    python benchmarks/decoder.py                      # medians of 21 pairs of passes at three sizes
    python benchmarks/decoder.py --pairs 101 --threads 2 --json decoder.json

Both models have the same random weights and run the same tokens in turns, in this process and without gradients. The
ratio is that of CPU times of the process, because other programs may share the machine. Wall-clock times are printed
too. This benchmark needs an environment with TransformerLens 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformer_lens.HookedTransformer import HookedTransformer as TransformerLensModel
from transformer_lens.HookedTransformer import HookedTransformerConfig as TransformerLensConfig

from sa_lens.core.decoder import HookedTransformer, HookedTransformerConfig

SIZES: dict[str, dict[str, int]] = {
    "small": {"n_layers": 4, "d_model": 128, "d_head": 32, "d_vocab": 2000, "batch": 1, "length": 32},
    "paper": {"n_layers": 8, "d_model": 128, "d_head": 8, "d_vocab": 50257, "batch": 1, "length": 256},
    "gpt2": {"n_layers": 12, "d_model": 768, "d_head": 64, "d_vocab": 50257, "batch": 1, "length": 128},
}


def compare(size: dict[str, int], pairs: int) -> dict[str, Any]:
    """Median milliseconds of both models, and the ratio of ours to theirs; the first three passes are not counted."""
    shape = {key: value for key, value in size.items() if key not in ("batch", "length")}
    fields: dict[str, Any] = {**shape, "n_ctx": size["length"], "act_fn": "gelu_new", "device": "cpu", "seed": 0}
    models = {
        "TransformerLens": TransformerLensModel(TransformerLensConfig(**fields)),
        "sa_lens": HookedTransformer(HookedTransformerConfig(**fields)),
    }
    tokens = torch.randint(size["d_vocab"], (size["batch"], size["length"]))
    cpu: dict[str, list[float]] = {name: [] for name in models}
    wall: dict[str, list[float]] = {name: [] for name in models}
    for pair in range(pairs + 3):
        for name, model in models.items():
            started = time.process_time(), time.perf_counter()
            model(tokens)
            if pair >= 3:
                cpu[name].append(1000 * (time.process_time() - started[0]))
                wall[name].append(1000 * (time.perf_counter() - started[1]))
    medians = {
        f"{kind} of {name} (ms)": statistics.median(times[name])
        for kind, times in (("CPU", cpu), ("wall", wall))
        for name in models
    }
    ratios = [ours / theirs for ours, theirs in zip(cpu["sa_lens"], cpu["TransformerLens"], strict=True)]
    return {**medians, "ratio of CPU times": statistics.median(ratios)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21, help="number of timed passes of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    rows = {}
    for name, size in SIZES.items():
        rows[name] = compare(size, options.pairs)
        print(f"{name:6s}", ", ".join(f"{key} {value:.2f}" for key, value in rows[name].items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
