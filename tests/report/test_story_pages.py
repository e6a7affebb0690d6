"""Stories agree with the model's own numbers."""

from __future__ import annotations

import pytest
import torch

from sa_lens.data.tokenizers import token_text
from sa_lens.report import Report
from sa_lens.report.story_pages import title_of
from sa_lens.report.subjects import Subject


def tokens_of(subject: Subject, page) -> torch.Tensor:
    return subject.model.to_tokens("".join(page.tokens[1:]), prepend_bos=True)


def close(value: float | None, true: float) -> bool:
    """Whether a number is the true one to three digits."""
    return value is not None and value == pytest.approx(true, rel=5.1e-3, abs=1e-6)


def test_predictions_are_the_log_softmax_of_each_stream(report: Report, gated: Subject) -> None:
    page = report.models[0].stories[1]
    tokens = tokens_of(gated, page)
    assert len(page.tokens) == tokens.shape[1]
    with torch.no_grad():
        clean = gated.model(tokens)[0].log_softmax(-1)
        with gated.model.ablated():
            ablated = gated.model(tokens)[0].log_softmax(-1)
    assert [one.stream for one in page.predictions.streams] == ["clean", "ablated"]
    for one, log_p in zip(page.predictions.streams, (clean, ablated), strict=True):
        for at in range(tokens.shape[1]):
            best = log_p[at].topk(5)
            assert [guess.token for guess in one.top[at]] == [token_text(gated.tokenizer, int(i)) for i in best.indices]
            assert all(close(g.log_probability, float(v)) for g, v in zip(one.top[at], best.values, strict=True))
        for at in range(tokens.shape[1] - 1):
            assert close(one.actual[at], float(log_p[at, tokens[0, at + 1]]))
        assert one.actual[-1] is None


def test_raster_is_the_masks(report: Report, gated: Subject) -> None:
    page = report.models[0].stories[0]
    assert page.gates is not None
    tokens = tokens_of(gated, page)
    with torch.no_grad(), gated.model.ablated():
        _, cache = gated.model.run_with_cache(tokens)
    true = set()
    for layer in range(2):
        attn = cache[f"blocks.{layer}.attn_gate.hook_mask"][0]
        for at, index in (attn.flatten(1) > 0).nonzero().tolist():
            true.add((f"L{layer}.attn.{index}", at))
        for at, index in (cache[f"blocks.{layer}.mlp_gate.hook_mask"][0] > 0).nonzero().tolist():
            true.add((f"L{layer}.mlp.{index}", at))
    assert {(unit.name, at) for unit in page.gates.units for at in unit.positions} == true


def test_tracks_hold_the_losses(report: Report, gated: Subject) -> None:
    page = report.models[0].stories[2]
    tracks = {track.name: track.values for track in page.tracks.tracks}
    clean, ablated = page.predictions.streams
    for at in range(len(page.tokens) - 1):
        assert tracks["loss, clean"][at + 1] == pytest.approx(-clean.actual[at], rel=1e-2)
        assert tracks["loss, ablated"][at + 1] == pytest.approx(-ablated.actual[at], rel=1e-2)
    assert {"units that entered", "ablated minus clean loss"} <= set(tracks)


def test_looks_are_the_largest_shares_of_attention(report: Report, gated: Subject) -> None:
    page = report.models[0].stories[0]
    tokens = tokens_of(gated, page)
    assert [(one.stream, one.layer, one.head) for one in page.looks] == [
        (stream, layer, head) for stream in ("clean", "ablated") for layer in range(2) for head in range(2)
    ]
    with torch.no_grad():
        _, clean = gated.model.run_with_cache(tokens)
        with gated.model.ablated():
            _, ablated = gated.model.run_with_cache(tokens)
    for one in page.looks:
        pattern = {"clean": clean, "ablated": ablated}[one.stream][f"blocks.{one.layer}.attn.hook_pattern"][0, one.head]
        for at, (positions, shares) in enumerate(zip(one.positions, one.shares, strict=True)):
            row = pattern[at].tolist()
            best = sorted(range(len(row)), key=lambda key: (-row[key], key))[:4]
            assert list(positions) == [key for key in best if row[key] >= 0.03]
            assert list(shares) == pytest.approx([row[key] for key in positions], abs=1e-6)
            assert max(positions) <= at


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("One day.\n\nAnna   ran.", "One day. Anna ran."),
        ("a " * 100, "a " * 27 + "a…"),
        ("x" * 100, "x" * 56 + "…"),
        ("<b>", "<b>"),
    ],
)
def test_title(text: str, title: str) -> None:
    assert title_of(text) == title
