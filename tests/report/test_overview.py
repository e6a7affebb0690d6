"""What a model is and how well it predicts."""

from __future__ import annotations

import math
from pathlib import Path

from sa_lens.report import Report
from sa_lens.training import evaluate_run, sample
from sa_lens.views import training_curves


def test_losses_are_those_of_an_evaluation(report: Report, gated_run: Path) -> None:
    found = evaluate_run(str(gated_run), tokens=100_000, device="cpu")
    clean, ablated = report.models[0].overview.losses.rows
    assert clean[:3] == ("clean", f"{found.clean_loss:.4f}", f"{math.exp(found.clean_loss):,.2f}")
    assert ablated[1] == f"{found.ablated_loss:.4f}"
    assert ablated[4] == f"{found.ablated_loss - found.clean_loss:+.4f}"
    facts = {fact.name: fact for fact in report.models[0].overview.facts}
    assert facts["Neurons used"].value == f"{found.mlp_units_used:.1%}"
    assert facts["Measured on"].value == f"{found.tokens:,} tokens"


def test_facts(report: Report, gated) -> None:
    gated_facts, dense_facts = ({fact.name: fact for fact in model.overview.facts} for model in report.models)
    assert gated_facts["Transformer"].value == "2 layers of 2 heads and 64 neurons"
    assert gated_facts["Parameters"].value == f"{sum(p.numel() for p in gated.model.parameters()):,}"
    assert gated_facts["Gates"].value == "local, hard: 4 of 16 attention units and 8 of 64 neurons"
    assert dense_facts["Gates"].value == "none"
    assert "Neurons used" not in dense_facts
    assert dense_facts["Trained on"].value == "300 generated stories"


def test_samples_continue_the_same_prompts_in_each_stream(report: Report, gated) -> None:
    found = report.models[0].overview.samples
    prompts = list(dict.fromkeys(one.prompt for one in found))
    assert len(prompts) == 3
    assert prompts[0] == ""
    assert prompts == list(dict.fromkeys(one.prompt for one in report.models[1].overview.samples))
    assert [(one.prompt, one.stream) for one in found] == [(p, s) for p in prompts for s in ("clean", "ablated")]
    drawn = sample(gated.model, prompts[1], max_new_tokens=60, seed=0)
    assert prompts[1] + found[2].text == drawn.clean
    assert prompts[1] + found[3].text == drawn.ablated
    other = sample(gated.model, prompts[1], max_new_tokens=60, seed=1)
    assert other.clean != drawn.clean


def test_training_curves_are_those_of_the_runs(report: Report, gated_run: Path, dense_run: Path) -> None:
    assert report.training == training_curves({"gated": gated_run, "dense": dense_run})
