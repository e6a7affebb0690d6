"""The shipped models of the stories do their tasks on sentences that no story holds, written by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from paraphrases import CLASSICS, PARAPHRASES, fill

import sa_lens as sa

PROMPTS = 40
"""Prompts of each template, with names that never meet in a story."""
BAR = 0.9
TEMPLATES = [
    *((task, template) for task, templates in PARAPHRASES.items() for template in templates),
    *(("ioi", template) for template in CLASSICS["ioi"]),
]
SHORTFALLS: dict[str, tuple[str, ...]] = {
    "stories-dense, clean": (
        "{A} came to the {P} and sat down there because",
        "{B} saw a {Q} in the shop but bought a {O}.",
        "{A} found a {O} near the {P} and put it in a bag.",
    ),
    "stories-local, clean": (
        "{A} sat under a tree with a book and read until",
        "{A} found a {O} near the {P} and put it in a bag.",
    ),
    "stories-local, ablated": (
        "{A} did not go to school because",
        "{A} sat under a tree with a book and read until",
        "{A} found a {O} near the {P} and put it in a bag.",
        "{A} came to the {P} and sat down there because",
    ),
}
"""Templates on which a stream stays below the bar, by what they begin with: what the models cannot do yet."""


@pytest.fixture(scope="module", params=["stories-dense", "stories-local"])
def accuracies(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """Pair accuracy of each stream of a shipped model on each template; prompts of one length run together."""
    model = sa.SelfAblatingTransformer.from_pretrained(request.param)
    by_length = defaultdict(list)
    for task, template in TEMPLATES:
        for prompt, answer, wrong in fill(task, template, PROMPTS):
            tokens = model.to_tokens(prompt)[0]
            by_length[len(tokens)].append(
                (template, tokens, model.to_single_token(answer), model.to_single_token(wrong))
            )
    right: dict[str, dict[str, float]] = {"clean": defaultdict(float)}
    if model.gates.gated:
        right["ablated"] = defaultdict(float)
    for group in by_length.values():
        templates, tokens, answers, wrongs = zip(*group, strict=True)
        batch, row = torch.stack(tokens), torch.arange(len(group))
        with torch.no_grad():
            if model.gates.gated:
                streams = model.run_streams(batch)
                logits = {"clean": streams.clean_logits[:, -1], "ablated": streams.ablated_logits[:, -1]}
            else:
                logits = {"clean": model(batch)[:, -1]}
        for stream, last in logits.items():
            better = last[row, torch.tensor(answers)] > last[row, torch.tensor(wrongs)]
            for template, correct in zip(templates, better.tolist(), strict=True):
                right[stream][template] += correct / PROMPTS
    return {f"{request.param}, {stream}": dict(counts) for stream, counts in right.items()}


@pytest.mark.slow
def test_every_template_but_the_known_shortfalls(accuracies: dict[str, dict[str, float]]) -> None:
    for name, by_template in accuracies.items():
        below = {template: round(share, 2) for template, share in by_template.items() if share < BAR - 1e-9}
        new = {template: share for template, share in below.items() if not template.startswith(SHORTFALLS[name])}
        assert not new, name


def test_indirect_objects_in_the_words_that_people_type_first(accuracies: dict[str, dict[str, float]]) -> None:
    for by_template in accuracies.values():
        assert min(by_template[template] for template in CLASSICS["ioi"]) >= BAR
