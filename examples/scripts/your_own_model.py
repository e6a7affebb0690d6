"""Put gates on a pretrained model, train them on your text, and study your task (notebook 06 as a script).

    python examples/scripts/your_own_model.py --base runs/dense --text stories.txt --task agreement.json --out runs/own

`--base` is a run folder, a folder or GGUF file of a Hugging Face model, or a name that TransformerLens knows, such as
gpt2 (which needs a network once).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import circuits, views  # noqa: E402


def main(
    base: str,
    text: str,
    out: Path,
    task: str = "ioi",
    k_attn: int = 16,
    k_mlp: int = 16,
    fit_tokens: int = 20_000,
    steps: int = 600,
    n_ctx: int = 64,
    pairs: int = 64,
    freeze: bool = True,
) -> None:
    """Train gates on a model, then patch it and find a circuit, in both streams.

    Args:
        base: Pretrained model.
        text: Text to train the gates on; anything that data.source accepts.
        out: Run folder for the trained model and the figures.
        task: ioi, pronoun, object, repeated, or a JSON file of pairs.
        k_attn: Number of attention units that a gate keeps.
        k_mlp: Number of neurons that a gate keeps.
        fit_tokens: Tokens that the gates are fitted to before the first step.
        steps: Optimizer steps.
        n_ctx: Length of the training sequences.
        pairs: Number of pairs to find circuits with; as many others to report on.
        freeze: Train only the gates.
    """
    settings = sa.RunConfig(
        model=sa.ModelConfig(n_ctx=n_ctx),
        gates=sa.GateConfig(k_attn=k_attn, k_mlp=k_mlp),
        data=sa.DataConfig(source=text),
        train=sa.TrainConfig(
            steps=steps,
            batch_size=16,
            lr=1e-3,
            init=base,
            freeze="base" if freeze else "none",
            fit_tokens=fit_tokens,
            sample_tokens=0,
        ),
    )
    model = sa.train(settings, out).model
    find, report = circuits.tasks.make(task, model.tokenizer, 2 * pairs, seed=0).split(seed=0)
    skill = circuits.skill(model, report)[["stream", "n", "pair_accuracy", "logit_difference", "able"]]
    print(skill.to_string(index=False))

    maps = [views.patch_map(circuits.patch(model, find, "resid_pre", stream=stream)) for stream in ("clean", "ablated")]
    print("wrote", views.save(views.side_by_side(maps, names=["clean", "ablated"]), out / "patching.html"))
    for stream in ("clean", "ablated"):
        result = circuits.find_circuit(model, find, report, "acdc", stream=stream)
        print(f"\n{result.summary()}")
        print("wrote", views.save(result.circuit, out / f"circuit-{stream}.html"))


if __name__ == "__main__":
    tyro.cli(main)
