"""How much a report measures of models of different sizes."""

from __future__ import annotations

import pytest

from sa_lens.report.effort import Effort, check_effort, effort_for
from sa_lens.report.measured_text import LEAST_BLOCKS
from sa_lens.report.subjects import Subject


def test_large_models_are_measured_less(gated: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    least = -(-LEAST_BLOCKS * gated.n_ctx * 110_000 // 35_000)
    usual = (64, ("acdc", "eap-ig", "gate"), 96, 10, 2)
    large = (16, ("eap-ig", "gate"), 24, 4, 1)
    for parameters, expected in {
        10**6: Effort(12, 3, 110_000, *usual),
        2 * 10**7: Effort(12, 3, 110_000, *usual),
        4 * 10**7: Effort(4, 2, 55_000, *large),
        10**10: Effort(4, 2, max(16_000, least), *large),
    }.items():
        monkeypatch.setattr(Subject, "parameters", parameters)
        assert effort_for([gated]) == expected
        assert effort_for([gated, gated], n_tokens=least).n_tokens == least


def test_what_is_asked_for_is_done_whatever_the_size(gated: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "parameters", 10**10)
    assert effort_for([gated], 7, 50_000, ["gate", "acdc"], 0) == Effort(7, 2, 50_000, 16, ("acdc", "gate"), 0, 4, 1)
    assert effort_for([gated], methods=[]).methods == ()


def test_what_cannot_be_done(gated: Subject) -> None:
    least = -(-LEAST_BLOCKS * gated.n_ctx * 110_000 // 35_000)
    with pytest.raises(ValueError, match=f"n_tokens=7 must be at least {least:,}, so that .* 12 blocks"):
        effort_for([gated], n_tokens=7)
    with pytest.raises(ValueError, match="n_stories=0 must be at least 1"):
        check_effort(n_stories=0)
    with pytest.raises(ValueError, match="n_units=-1 must be 0 or more"):
        check_effort(n_units=-1)
    with pytest.raises(ValueError, match="method='relp' is not one of 'acdc', 'eap-ig', 'gate'"):
        check_effort(methods=["relp"])
