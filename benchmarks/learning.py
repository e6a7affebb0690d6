"""Measures whether the demo's model learns its task with every seed, number of threads and precision.

    python benchmarks/learning.py --rows rows.jsonl                           10 seeds x 1 and 2 threads, bf16
    python benchmarks/learning.py --rows rows.jsonl --precision fp32 --seeds 0 1
    python benchmarks/learning.py --rows rows.jsonl --training joint          both streams from the first step
    python benchmarks/learning.py --rows rows.jsonl --table                   print the table of the file

Every training appends one row to the file when it ends. Rows that the file already has are not trained again, so you
can stop the program, and several programs with different seeds can share a file. The dense baseline of each seed is
trained once, on one thread, on the same tokens with the same learning rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sa_lens.circuits import skill
from sa_lens.circuits.tasks import ioi
from sa_lens.config import RunConfig
from sa_lens.data import prepare
from sa_lens.demo.pair import pair_run
from sa_lens.shipped.measuring import ABLATED_BAR, CLEAN_BAR, PAIR_BARS
from sa_lens.training import train

PAIRS = 400
"""Number of IOI prompts. Their pairs of names never occur together in a training story."""
LEAST = {"clean pair": PAIR_BARS["clean"], "ablated pair": PAIR_BARS["ablated"]}
MOST = {"clean / dense": CLEAN_BAR, "ablated / dense": ABLATED_BAR}
"""Bars: smallest accuracies, and largest losses as multiples of the dense model's loss."""
KEY = ["training", "seed", "threads", "precision"]
"""Columns that identify a row."""


def configuration(training: str, seed: int, precision: str) -> RunConfig:
    """The settings: `scheduled` as in the demo, `joint` from the first step on both streams, `dense` without gates."""
    run = pair_run("none" if training == "dense" else "local", seed)
    changes: dict[str, Any] = {"precision": precision, "eval_every": run.train.steps, "save_every": run.train.steps}
    if training == "joint":
        changes |= {"dense_share": 0.0, "dense_lr": None, "lr": run.train.dense_lr or run.train.lr}
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def measure(training: str, seed: int, threads: int, precision: str) -> dict[str, Any]:
    """Trains one model and returns its row."""
    run = configuration(training, seed, precision)
    torch.set_num_threads(threads)
    data = prepare(run.data, run.model.n_ctx, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        began, busy = time.perf_counter(), time.process_time()
        result = train(run, Path(folder) / "run", device="cpu", progress=sys.stderr.isatty())
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - busy
    skills = skill(result.model.eval(), ioi(data.tokenizer, n=PAIRS, seed=seed, words="stories", name_pairs="held-out"))
    row: dict[str, Any] = dict(zip(KEY, (training, seed, threads, precision), strict=True))
    row |= {"clean loss": result.evaluation.clean_loss, "ablated loss": result.evaluation.ablated_loss}
    for stream in skills.to_dict("records"):
        row[f"{stream['stream']} pair"] = stream["pair_accuracy"]
        row[f"{stream['stream']} top-1"] = stream["top1_accuracy"]
    return {**row, "seconds": round(seconds), "processor seconds": round(processor_seconds)}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per training, with the ratio to the dense baseline of the same seed and precision, and the verdict."""
    trained = pd.DataFrame(rows).drop_duplicates(KEY, keep="last")
    dense = trained[trained.training == "dense"].set_index(["seed", "precision"])["clean loss"]
    shown = trained.sort_values(KEY).reset_index(drop=True)
    base = [dense.get((row["seed"], row["precision"]), float("nan")) for _, row in shown.iterrows()]
    for stream in ("clean", "ablated"):
        shown[f"{stream} / dense"] = shown[f"{stream} loss"].astype(float) / base
    passes = pd.concat([shown[name] >= bar for name, bar in LEAST.items()], axis=1).all(axis=1)
    passes &= pd.concat([shown[name] <= bar for name, bar in MOST.items()], axis=1).all(axis=1)
    shown["passes"] = ["" if kind == "dense" else str(ok) for kind, ok in zip(shown.training, passes, strict=True)]
    return shown


def main() -> None:
    """Trains the rows that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON Lines file of the rows")
    parser.add_argument(
        "--training", choices=["scheduled", "joint", "dense"], nargs="+", default=["dense", "scheduled"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=["bf16", "fp32"], nargs="+", default=["bf16"])
    parser.add_argument("--table", action="store_true", help="print the table of the file and train nothing")
    options = parser.parse_args()
    wanted = [
        (training, seed, threads, precision)
        for seed in options.seeds
        for precision in options.precision
        for training in options.training
        for threads in ([1] if training == "dense" else options.threads)
    ]
    for inputs in [] if options.table else wanted:
        if not any(tuple(row[name] for name in KEY) == inputs for row in read(options.rows)):
            row = measure(*inputs)
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    rows = read(options.rows)
    if not rows:
        raise SystemExit(f"{options.rows} has no rows: run without --table first")
    print(table(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
