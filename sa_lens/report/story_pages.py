"""One story as the explorer shows it: losses, predictions, units that stay, and where the heads look."""

from __future__ import annotations

from dataclasses import replace

import torch

from sa_lens.core.host import in_stream
from sa_lens.report.contents import Looks, StoryPage
from sa_lens.report.subjects import Subject
from sa_lens.views import gate_raster, predictions, story
from sa_lens.views.wording import read_text

TITLE = 56
"""Characters of a title."""
GUESSES = 5
"""Tokens that a stream expects next, at each token."""
LOOKS = 4
"""Earlier tokens to which a head attends most, at each token."""
LEAST_SHARE = 0.03
"""Share of attention below which a token is left out."""


def story_page(subject: Subject, text: str) -> StoryPage:
    """Returns all that is shown of one story.

    Args:
        text: a text that the model can read whole.
    """
    model = subject.model
    title = title_of(text)
    tracks = replace(story(model, text), title=title)
    gates = None
    if model.gates.gated and model.gates.kind == "hard":
        gates = gate_raster(model, text, title=title)
    guesses = replace(predictions(model, text, top=min(GUESSES, model.cfg.d_vocab)), title=title)
    return StoryPage(title, tracks.tokens, tracks, guesses, gates, looks(subject, text))


def title_of(text: str) -> str:
    """Returns the first words of a text."""
    words = " ".join(text[: 4 * TITLE].split())
    if len(words) <= TITLE:
        return words
    cut = words[:TITLE]
    return (cut.rsplit(" ", 1)[0] if " " in cut[TITLE // 2 :] else cut).rstrip(" ,.;:") + "…"


def looks(subject: Subject, text: str) -> tuple[Looks, ...]:
    """Returns where each head looks in each stream: the positions with the largest shares, from three per cent on."""
    model = subject.model
    tokens, _ = read_text(model, text)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    records = []
    for stream in subject.streams:
        with torch.no_grad(), in_stream(model, stream):
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
        for layer, name in enumerate(names):
            # equal shares: the earlier position first, whatever the machine
            best = cache[name][0].float().cpu().sort(dim=-1, descending=True, stable=True)
            for head in range(best.values.shape[0]):
                columns = (best.indices[head, :, :LOOKS].tolist(), best.values[head, :, :LOOKS].tolist())
                kept = [
                    [pair for pair in zip(*row, strict=True) if pair[1] >= LEAST_SHARE]
                    for row in zip(*columns, strict=True)
                ]
                positions, shares = (tuple(tuple(pair[i] for pair in row) for row in kept) for i in (0, 1))
                records.append(Looks(stream, layer, head, positions, shares))
    return tuple(records)
