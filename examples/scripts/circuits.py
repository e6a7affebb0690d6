"""Compare circuits of a dense and a self-ablating model at equal faithfulness (notebook 02 as a script).

python examples/scripts/circuits.py --run stories-local --baseline stories-dense --out runs/circuits
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import circuits, views  # noqa: E402
from sa_lens.config import Method  # noqa: E402

METHODS: tuple[Method, ...] = ("acdc", "eap-ig", "exact")


def main(
    run: str = "stories-local",
    baseline: str = "stories-dense",
    out: Path = Path("runs/circuits"),
    task: str = "ioi",
    words: Literal["stories", "tinystories"] = "stories",
    pairs: int = 128,
    methods: tuple[Method, ...] = METHODS,
) -> None:
    """Find circuits in three streams, judge them on other prompts, and compare the gates with them.

    Args:
        run: Self-ablating model: a shipped one, a run folder or a Hub id.
        baseline: Dense model with the same training.
        out: Folder for tables and figures.
        task: ioi, pronoun, object, repeated, or a JSON file.
        words: Vocabulary of the prompts.
        pairs: Number of pairs to find circuits with; as many others to report on.
        methods: Methods that find circuits.
    """
    dense, gated = (sa.SelfAblatingTransformer.from_pretrained(folder) for folder in (baseline, run))
    streams = {("dense", "clean"): dense, ("self-ablating", "clean"): gated, ("self-ablating", "ablated"): gated}
    find, report = circuits.tasks.make(task, gated.tokenizer, 2 * pairs, seed=0, words=words).split(seed=0)
    out.mkdir(parents=True, exist_ok=True)

    results = {}
    for (name, stream), model in streams.items():
        exp = circuits.Experiment(model, find, stream=stream)
        judge = exp.on(report)
        for method in methods:
            results[name, stream, method] = circuits.find_circuit(exp, judge, method)
    table = circuits.circuit_table(results, ("model", "stream", "method"))
    table.to_csv(out / "circuits.csv", index=False)
    shown = ["model", "stream", "masks", "method", "pair_accuracy", "able", "corrupt_kl", "edges", "f", "edges_0.9"]
    shown += ["cmd"]
    print(table[shown].round(3).to_string(index=False))

    names = [f"{name}, {stream} stream" for name, stream in streams]
    for method in methods:
        drawn = [results[name, stream, method].circuit for name, stream in streams]
        figure = views.side_by_side(drawn, f"{task}: {method}", names=names)
        print("wrote", views.save(figure, out / f"{method}.html"))
        curves = {
            f"{name}, {stream}": curve.table()
            for name, stream in streams
            if (curve := results[name, stream, method].curve) is not None
        }
        if curves and method != "acdc":
            print("wrote", views.save(views.faithfulness_chart(curves), out / f"faithfulness-{method}.html"))

    rankings = circuits.gate_rankings(gated, find, draws=3)
    references = {
        f"{method}, {stream}": result.circuit for (name, stream, method), result in results.items() if name != "dense"
    }
    agreement = circuits.agreement_table(rankings, references)
    agreement.to_csv(out / "gate.csv", index=False)
    print("\nThe gate as a circuit: AUROC against the edges of each circuit; 0.5 is chance")
    print(agreement.pivot_table(index="ranking", columns="reference", values="auroc", sort=False).round(2).to_string())


if __name__ == "__main__":
    tyro.cli(main)
