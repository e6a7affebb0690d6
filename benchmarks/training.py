"""Measures speed and memory of training and inference, each row in a separate process.

    python benchmarks/training.py --json rows.json
    python benchmarks/training.py --only paper            # only the rows with this name
    python benchmarks/training.py --device cuda --json rows.json

A row alternates training steps (loss, backward pass, clipping, AdamW) with matrix products, which measure the speed of
the machine at that moment. Of both, the fastest of several counts, because other processes can only slow them down.
`core_share` is the share of the cores that this process had in its fastest step. If it is well below 1, other processes
used them too. On such a machine, `--threads 1 --clock cpu` measures the processor time of one thread, which does not
include waiting.

As in `train`, freed memory stays in the process. Peak memory is the resident set of the process on a CPU, and what
torch allocated on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "normalization_type": "RMS",
    "final_rms": True,
    "gated_mlp": True,
    "act_fn": "silu",
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "rotary-16-heads": LLAMA
    | {"n_layers": 4, "d_model": 128, "n_heads": 16, "n_key_value_heads": 4, "d_head": 8, "rotary_dim": 8}
    | {"d_mlp": 384},
    "rotary-4-heads": LLAMA
    | {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_key_value_heads": 2, "d_head": 32, "rotary_dim": 32}
    | {"d_mlp": 384},
    "smollm2": LLAMA
    | {"n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_value_heads": 3, "d_head": 64, "rotary_dim": 64}
    | {"d_mlp": 1536, "rotary_base": 100000},
}
SHAPES["smollm2-gpu"] = SHAPES["smollm2"]
"""Shapes other than the paper's, by the name of their rows. `smollm2` is that of SmolLM2-135M."""


@dataclass(frozen=True)
class Row:
    """A row of the table, measured by one process."""

    name: str
    variant: str
    """Scope of the gates in a training row; `clean`, `ablated`, `plain` in an inference row."""
    path: str = "fused"
    """Path of the loss; of an inference row: `forward` or `cache`."""
    dtype: str = "bf16"
    batch: int = 8
    n_ctx: int = 256
    vocab: int = 50257
    d_model: int = 128
    compiled: bool = False
    recorded: bool = False
    """Whether the step is replayed as a CUDA graph, as `train` does on a GPU."""
    recompute: bool = False
    frozen: bool = False
    """Whether only the gates are trained."""
    against: str = ""
    """Variant that is timed in turns with an inference row, in the same process."""


def rows(device: str) -> Iterator[Row]:
    """Yields the rows in the order of the table."""
    yield Row("paper", "local")
    yield Row("paper", "global")
    yield Row("paper", "none")
    yield Row("paper", "local", dtype="fp32")
    yield Row("paper", "global", dtype="fp32")
    yield Row("paper", "local", path="hooked", dtype="fp32")
    yield Row("paper", "global", path="hooked", dtype="fp32")
    yield Row("paper", "local", path="hooked")
    yield Row("vocab", "local", vocab=4096)
    yield Row("vocab", "none", vocab=4096)
    yield Row("vocab", "local", path="hooked", dtype="fp32", vocab=4096)
    yield Row("compiled", "local", compiled=True)
    yield Row("recompute", "local", recompute=True)
    for path, variant, against in (("forward", "clean", "plain"), ("cache", "ablated", "clean")):
        yield Row("inference", variant, path=path, dtype="fp32", vocab=4096, against=against)
    for batch in (2, 4, 8, 16, 32):
        yield Row("batch", "local", batch=batch, vocab=4096)
    for n_ctx in (64, 128, 256, 512, 1024):
        yield Row("n_ctx", "local", n_ctx=n_ctx, vocab=4096)
    for name in ("rotary-16-heads", "rotary-4-heads"):
        for path, dtype in (("fused", "bf16"), ("fused", "fp32"), ("hooked", "fp32")):
            yield Row(name, "local", path, dtype, vocab=4096)
    for frozen in (True, False):
        for path, dtype in (("fused", "bf16"), ("hooked", "fp32")):
            yield Row("smollm2", "local", path, dtype, batch=2, n_ctx=128, vocab=49152, d_model=576, frozen=frozen)
    if device == "cuda":
        for d_model in (128, 768):
            for path, recorded in (("hooked", False), ("fused", False), ("fused", True)):
                for variant in ("none", "local", "global"):
                    yield Row("gpu", variant, path=path, batch=32, d_model=d_model, recorded=recorded)
        for frozen in (True, False):
            for path, recorded in (("hooked", False), ("fused", False), ("fused", True)):
                yield Row(
                    "smollm2-gpu", "local", path, batch=32, vocab=49152, d_model=576, frozen=frozen, recorded=recorded
                )


def flop_per_token(row: Row, cfg: Any) -> float:
    """FLOP of the matrix products of one training step, forward and backward, per token."""
    d, heads, shared = cfg.d_model, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads
    mlp = (3 if cfg.gated_mlp else 2) * d * cfg.d_mlp
    weights = cfg.n_layers * (2 * d * cfg.d_head * (heads + shared) + mlp) + d * row.vocab
    attention = cfg.n_layers * 2 * heads * cfg.d_head * (row.n_ctx + 1) / 2
    if row.variant == "none":
        return 6.0 * (weights + attention)
    gates = cfg.n_layers * d * (heads * cfg.d_head + cfg.d_mlp)
    # of a frozen base: the clean stream forward, the ablated one forward and back without gradients of weights
    return 6.0 * ((1 if row.frozen else 2) * (weights + attention) + gates)


def best(repeats: int, *functions: Callable[[], float]) -> list[float]:
    """The smallest of `repeats` results of each function, called in turn."""
    results = [[f() for f in functions] for _ in range(repeats)]
    return [min(column) for column in zip(*results, strict=True)]


class Clock:
    """Measures the seconds that a function takes, and its share of the cores in the fastest call."""

    def __init__(self, device: str, threads: int, clock: str) -> None:
        self.device, self.threads, self.clock = device, threads, clock
        self.fastest, self.core_share = float("inf"), 0.0

    def __call__(self, function: Callable[[], Any]) -> float:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        cpu, start = time.process_time(), time.perf_counter()
        function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        wall, busy = time.perf_counter() - start, time.process_time() - cpu
        seconds = busy if self.clock == "cpu" else wall
        if seconds < self.fastest:
            self.fastest, self.core_share = seconds, busy / wall / self.threads
        return seconds


def matmul_seconds(device: str, dtype: Any, size: int, clock: str) -> Callable[[], float]:
    """Returns a function that times one square matrix product."""
    import torch

    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    timer = Clock(device, 1, clock)
    return lambda: timer(lambda: torch.mm(a, a, out=out))


def measure(row: Row, device: str, threads: int, repeats: int, clock: str) -> dict[str, Any]:
    """Measures one row of the table."""
    import torch

    torch.set_num_threads(threads)
    # probabilities of rare tokens underflow to denormal numbers, which a CPU processes slowly
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    timer = Clock(device, threads, clock)
    model = build(row, device)
    action = inference(row, model, row.variant) if row.name == "inference" else training_step(row, model)
    rival = inference(row, build(row, device), row.against) if row.against else None
    size = 1536 if device == "cpu" else 8192
    products = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    for _ in range(3 if row.compiled or device == "cuda" else 2):
        action()
        if rival:
            rival()
    seconds, *others = best(
        repeats,
        lambda: timer(action),
        *(matmul_seconds(device, dtype, size, clock) for dtype in products),
        *([lambda: Clock(device, threads, clock)(rival)] if rival else []),
    )
    product_seconds = others[: len(products)]
    rates = [2 * size**3 / s for s in product_seconds]
    tokens_per_s = row.batch * row.n_ctx / seconds
    record = dataclasses.asdict(row) | {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": threads,
        "clock": clock,
        "tokens_per_s": round(tokens_per_s, 1),
        "peak_gb": round(peak_gb(device), 3),
        "core_share": round(timer.core_share, 2),
        "matmul_gflop_per_s": round(rates[0] / 1e9, 1),
    }
    if rival:
        record["time_over_rival"] = round(seconds / others[-1], 2)
    else:
        flop = flop_per_token(row, model.cfg)
        record["mflop_per_token"] = round(flop / 1e6, 1)
        record["share_of_matmul_rate"] = round(flop * tokens_per_s / rates[-1], 3)
    return record


def peak_gb(device: str) -> float:
    """Largest memory of this process so far, 10^9 bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def build(row: Row, device: str) -> Any:
    """The row's model, at the paper's size unless the row says otherwise."""
    from sa_lens.config import GateConfig, ModelConfig
    from sa_lens.core import HookedTransformerConfig, SelfAblatingTransformer

    shape: Any
    if row.name in SHAPES:
        shape = HookedTransformerConfig(n_ctx=row.n_ctx, d_vocab=row.vocab, **SHAPES[row.name])
    else:
        n_heads = 16 if row.d_model == 128 else 12
        shape = ModelConfig(d_model=row.d_model, n_heads=n_heads, n_ctx=row.n_ctx, d_vocab=row.vocab)
    scope = row.variant if row.variant in ("none", "local", "global", "both") else "local"
    return SelfAblatingTransformer(shape, GateConfig(scope=scope), device=device).freeze_base(row.frozen)


def training_step(row: Row, model: Any) -> Callable[[], Any]:
    """Returns a function that makes one optimizer step."""
    import torch

    from sa_lens.config import LossConfig, TrainConfig
    from sa_lens.core import TwoStreamLoss
    from sa_lens.training.optimizer import adamw, allocate_averages
    from sa_lens.training.recorded_step import RecordedStep

    loss: Any = TwoStreamLoss(
        model,
        LossConfig(clean=0.5, ablated=0.5),
        path=row.path,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[row.dtype],
        checkpoint_activations=row.recompute,
    )
    if row.compiled:
        loss = torch.compile(loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, TrainConfig(lr=1e-3, weight_decay=0.0), fused=True)
    if model.W_E.device.type == "cpu":
        allocate_averages(optimizer)
    tokens = torch.randint(0, row.vocab, (row.batch, row.n_ctx + 1), device=model.W_E.device)

    recorded = RecordedStep(loss) if row.recorded else None

    def step() -> None:
        if recorded is not None:
            recorded(tokens[:, :-1], tokens[:, 1:], clean_alone=False)
        else:
            loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(row: Row, model: Any, variant: str) -> Callable[[], Any]:
    """Returns a function that runs one forward pass, with or without a cache of all activations."""
    import torch

    if variant == "plain":
        model = model.to_hooked_transformer()
    tokens = torch.randint(0, row.vocab, (row.batch, row.n_ctx), device=model.W_E.device)
    run = model if row.path == "forward" else model.run_with_cache

    @torch.no_grad()
    def forward() -> None:
        if variant == "ablated":
            with model.ablated():
                run(tokens)
        else:
            run(tokens)

    return forward


def in_process(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the row in a separate process."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps(dataclasses.asdict(row))]
    command += ["--device", args.device, "--threads", str(args.threads), "--repeats", str(args.repeats)]
    command += ["--clock", args.clock]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the ratios of interest for the rows that were measured."""

    def rate(**wanted: Any) -> float | None:
        rates = [r["tokens_per_s"] for r in records if all(r[key] == value for key, value in wanted.items())]
        return rates[0] if rates else None

    def ratio(label: str, above: dict[str, Any], below: dict[str, Any]) -> Iterator[str]:
        a, b = rate(**above), rate(**below)
        if a and b:
            yield f"{label}: {a / b:.2f}x"

    paper = {"name": "paper", "path": "fused", "dtype": "bf16"}
    for scope in ("local", "global"):
        plain = {**paper, "variant": "none"}
        yield from ratio(f"{scope} step over plain step, time", plain, {**paper, "variant": scope})
        for dtype in ("bf16", "fp32"):
            fused = {**paper, "variant": scope, "dtype": dtype}
            yield from ratio(f"{scope} {dtype}, fused over hooked path, rate", fused, {**fused, "path": "hooked"})
        yield from ratio(
            f"{scope}, fused bf16 over hooked fp32, rate",
            {**paper, "variant": scope},
            {**paper, "variant": scope, "path": "hooked", "dtype": "fp32"},
        )
    small = {"name": "vocab", "path": "fused"}
    yield from ratio(
        "local over plain step, 4,096 words, time", {**small, "variant": "none"}, {**small, "variant": "local"}
    )
    fused, hooked = {"path": "fused", "dtype": "bf16"}, {"path": "hooked", "dtype": "fp32"}
    for name, frozen in [*((name, False) for name in SHAPES), ("smollm2", True)]:
        shape = {"name": name, "frozen": frozen}
        label = f"{name}, {'base frozen' if frozen else 'all trained'}, fused bf16 over hooked fp32, rate"
        yield from ratio(label, shape | fused, shape | hooked)
    for r in records:
        if r["against"]:
            yield f"inference, {r['path']}, {r['variant']} over {r['against']}, time: {r['time_over_rival']:.2f}x"
    yield from ratio("eager over compiled, rate", {**paper, "variant": "local"}, {"name": "compiled"})


COLUMNS = (
    "name", "variant", "path", "dtype", "frozen", "batch", "n_ctx", "vocab", "tokens_per_s", "peak_gb",
    "share_of_matmul_rate", "matmul_gflop_per_s", "core_share",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="number of CPU threads of a row"
    )
    parser.add_argument("--repeats", type=int, default=7, help="number of steps measured for a row; the fastest counts")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time of one thread")
    parser.add_argument("--only", nargs="+", help="names of rows: paper, vocab, compiled, recompute, inference, ...")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu counts one thread of a CPU: add --threads 1 --device cpu")
    if args.row:
        from sa_lens.core.freed_memory import kept_freed_memory

        with kept_freed_memory():
            record = measure(Row(**json.loads(args.row)), args.device, args.threads, args.repeats, args.clock)
        print(json.dumps(record))
        return
    chosen = [row for row in rows(args.device) if not args.only or row.name in args.only]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: no such rows; names are {sorted({r.name for r in rows('cuda')})}")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    records = []
    for row in chosen:
        record = in_process(row, args)
        records.append(record)
        print("| " + " | ".join(str(record.get(column, "")) for column in COLUMNS) + " |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
    print("\n" + "\n".join(summary(records)))


if __name__ == "__main__":
    main()
