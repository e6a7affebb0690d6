"""Gates on a model that exists, trained on one's own text, and a task of one's own: notebook 06 as a script.

    python examples/scripts/your_own_model.py --base runs/dense --text stories.txt --task agreement.json --out runs/own

`--base` is a run folder, a Hub id, or a name that TransformerLens knows, such as gpt2 (which needs a network once).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens.circuits import find_circuit, patch, skill, tasks  # noqa: E402
from sa_lens.training import train  # noqa: E402
from sa_lens.views import patch_map, save, side_by_side  # noqa: E402


def main(
    base: str,
    text: str,
    out: Path,
    task: str = "ioi",
    k_attn: int = 16,
    k_mlp: int = 16,
    steps: int = 600,
    n_ctx: int = 64,
    pairs: int = 64,
    freeze: bool = True,
) -> None:
    """Train gates on a model, then patch it and find a circuit in both streams.

    Args:
        base: The model.
        text: Text to train the gates on, as data.source.
        out: Run folder to write.
        task: ioi, pronoun, object, repeated, or a JSON file of pairs.
        k_attn: Attention units that stay in a layer.
        k_mlp: Neurons that stay in a layer.
        steps: Optimizer steps.
        n_ctx: Length of the training sequences.
        pairs: Prompts to find with, and as many to report on.
        freeze: Train the gates alone.
    """
    settings = sa.RunConfig(
        model=sa.ModelConfig(n_ctx=n_ctx),
        gates=sa.GateConfig(k_attn=k_attn, k_mlp=k_mlp, temperature=0.1),
        data=sa.DataConfig(source=text),
        train=sa.TrainConfig(
            steps=steps, batch_size=16, lr=3e-3, init=base, freeze="base" if freeze else "none", sample_tokens=0
        ),
    )
    model = train(settings, out).model
    find, report = tasks.make(task, model.tokenizer, 2 * pairs, seed=0).split(seed=0)
    print(skill(model, report)[["stream", "n", "pair_accuracy", "logit_difference", "able"]].to_string(index=False))

    maps = [patch_map(patch(model, find, "resid_pre", stream=stream)) for stream in ("clean", "ablated")]
    print("wrote", save(side_by_side(maps, names=["clean", "ablated"]), out / "patching.html"))
    for stream in ("clean", "ablated"):
        found = find_circuit(model, find, report, "acdc", stream=stream)
        print(f"\n{found.summary()}")
        print("wrote", save(found.circuit, out / f"circuit-{stream}.html"))


if __name__ == "__main__":
    tyro.cli(main)
