"""Compare units of a dense and a self-ablating model at equal activity (notebook 03 as a script).

python examples/scripts/units.py --run stories-local --baseline stories-dense --out runs/units
"""

from __future__ import annotations

import warnings
from pathlib import Path

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import pandas as pd  # noqa: E402

import sa_lens as sa  # noqa: E402
from sa_lens import training, units, views  # noqa: E402


def main(
    run: str = "stories-local",
    baseline: str = "stories-dense",
    out: Path = Path("runs/units"),
    tokens: int = 100_000,
    explained: int = 16,
    probe_tokens: int = 5000,
) -> None:
    """Describe and compare all units, explain some of them, and measure mask leakage and the sparsity of weights.

    Args:
        run: Self-ablating model: a shipped one, a run folder or a Hub id.
        baseline: Dense model with the same training.
        out: Folder for tables and figures.
        tokens: Number of training tokens to calibrate on, and of validation tokens to measure on.
        explained: Number of units of the ablated stream to explain.
        probe_tokens: Number of tokens in each half of the text that the probes of the masks read.
    """
    models = {
        name: sa.SelfAblatingTransformer.from_pretrained(folder)
        for name, folder in (("dense", baseline), ("self-ablating", run))
    }
    gated = models["self-ablating"]
    text = training.text_of_run(run, gated)
    streams = {"dense": ("clean",), "self-ablating": ("clean", "ablated")}
    rules = {name: units.calibrate(model, text.train, streams[name], n_tokens=tokens) for name, model in models.items()}
    tables = {
        name: units.specialization(model, text.validation, rules[name], n_tokens=tokens).table
        for name, model in models.items()
    }
    written = {f"units-{name}": table for name, table in tables.items()}

    columns = ["effective_tokens", "effective_classes", "kurtosis"]
    written["matched"] = pd.concat(
        units.compare(tables["dense"], tables["self-ablating"], columns, streams=("clean", stream)).assign(
            stream=stream
        )
        for stream in streams["self-ablating"]
    )
    print("At equal layer and activity, self-ablating minus dense")
    print(written["matched"][["stream", "column", "difference", "low", "high"]].round(3).to_string(index=False))

    explanations = units.explain(gated, text.validation, rules["self-ablating"]["ablated"], explained, n_tokens=tokens)
    written["explanations"] = explanations.table
    print("\nExplained units, ablated stream")
    print(
        explanations.table[["layer", "site", "unit", "pattern", "text_f1", "list_text_f1"]]
        .round(2)
        .to_string(index=False)
    )

    leak = units.leakage(gated, text.validation, n_tokens=min(tokens, 20_000), probe_tokens=probe_tokens)
    written["leakage"] = leak.losses
    print(f"\nWhat the masks carry\n{leak.summary.round(3).to_string()}")
    written["sparsity"] = pd.concat(units.sparsity(model).assign(model=name) for name, model in models.items())

    out.mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        table.to_csv(out / f"{name}.csv", index=False)
        print("wrote", out / f"{name}.csv")
    spread = {
        f"{name}, {stream}": group.loc[group["live"], "effective_tokens"].dropna().to_numpy()
        for name, table in tables.items()
        for stream, group in table.groupby("stream", sort=False)
    }
    counts = views.histogram(spread, "On how many tokens does a unit fire?", "effective tokens of live units")
    print("wrote", views.save(counts, out / "effective-tokens.html"))


if __name__ == "__main__":
    tyro.cli(main)
