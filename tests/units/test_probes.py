"""Probes learn what is there and nothing else; predictions from counts are those of the formula."""

import numpy as np
import pytest
import torch

from sa_lens.units.probes import fit_probe, predict_from_counts


def test_a_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (900,), generator=generator)
    groups = torch.arange(900) // 30
    signal = torch.nn.functional.one_hot(labels, 3).float() + 0.1 * torch.randn(900, 3, generator=generator)
    noise = torch.randn(900, 3, generator=generator)
    found = {}
    for name, features in (("signal", signal), ("noise", noise)):
        log_p = fit_probe(features[:600], labels[:600], features[600:], groups=groups[:600])
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(300))
        found[name] = float(-log_p.gather(-1, labels[600:, None]).mean())
    assert found["signal"] < 0.3
    assert found["noise"] == pytest.approx(np.log(3), abs=0.03)


def test_predictions_from_counts_are_those_of_the_formula():
    read = [torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 3])]
    labels = [torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1])]
    found = predict_from_counts(read, labels).exp()
    share = np.array([4, 4]) / 8

    def table(strength):
        counts = np.array([[2, 1], [0, 2], [1, 0], [0, 0]])
        return (counts + strength * share) / (counts.sum(-1, keepdims=True) + strength)

    candidates = [table(strength)[read[1]] for strength in (1, 3, 10, 30, 100, 300, 1000)]
    assert any(np.allclose(found, candidate) for candidate in candidates)
    np.testing.assert_allclose(found[2], share)  # a token that training has not seen
