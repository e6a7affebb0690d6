"""Save every view of a text on both streams as HTML files that open from disk (notebook 05 as a script).

python examples/scripts/views.py --run stories-local --text "Lily and Tom went to the park."
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import views  # noqa: E402


def main(
    run: str = "stories-local",
    out: Path = Path("runs/views"),
    text: str = "It was a cool day. Lily and Tom went to the park. Tom gave a ball to Lily.",
    layer: int = -1,
    dark: bool = False,
) -> None:
    """Save every view of a text, and the records from which the views are drawn.

    Args:
        run: Self-ablating model: a shipped one, a run folder or a Hub id.
        out: Folder for the files.
        text: The text.
        layer: Layer of the attention patterns; negative numbers count from the last.
        dark: Use a dark background.
    """
    model = sa.SelfAblatingTransformer.from_pretrained(run)
    raster = views.gate_raster(model, text)
    neurons = [unit for unit in raster.units if unit.site == "mlp"]
    strongest = max(neurons, key=lambda unit: max(map(abs, unit.values)))
    unit = strongest.name
    shown: dict[str, Any] = {
        "story": views.story(model, text, units=[unit]),
        "predictions": views.predictions(model, text),
        "lens": views.logit_lens(model, text),
        "raster": raster,
        "activations": views.unit_activations(model, text, most=12),
        "attention": views.attention(model, text, layer=layer % model.cfg.n_layers),
    }
    if (Path(run) / "metrics.jsonl").exists():
        shown["training"] = views.training_curves([run])
    for name, record in shown.items():
        views.save(record, out / f"{name}.json")
        print("wrote", views.save(record, out / f"{name}.html", dark=dark))


if __name__ == "__main__":
    tyro.cli(main)
