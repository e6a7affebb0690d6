"""Probes: predictions of a class from the features of a token, by logistic regression or from counts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

PROBE_STEPS, PATIENCE = 3000, 3
"""Largest number of batches on which a probe is trained, and of evaluations without improvement before it stops."""


def predict_from_counts(
    tokens: list[Int[Tensor, " token"]], labels: list[Int[Tensor, " token"]]
) -> Float[Tensor, "test classes"]:
    """Returns log-probabilities of the labels of the second half, given the token, from counts in the first half.

    The probability of label y after token x is `(n(x, y) + a p(y)) / (n(x) + a)`. The strength a of the smoothing is
    the one that predicts the tokens of the first half best when each is left out in turn.
    """
    n_classes, n_tokens = (int(max(half.max() for half in halves)) + 1 for halves in (labels, tokens))
    pairs = torch.zeros(n_tokens, n_classes, dtype=torch.float64, device=labels[0].device)
    pairs.index_put_((tokens[0], labels[0]), torch.ones_like(labels[0], dtype=torch.float64), accumulate=True)
    # each class is counted once more, so that no probability is zero
    frequency = (pairs.sum(0) + 1) / (len(labels[0]) + n_classes)

    def left_out_likelihood(strength: float) -> float:
        others = pairs[tokens[0], labels[0]] - 1 + strength * frequency[labels[0]]
        return float((others / (pairs[tokens[0]].sum(-1) - 1 + strength)).log().mean())

    strength = max((1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), key=left_out_likelihood)
    counts = pairs[tokens[1]]
    return ((counts + strength * frequency) / (counts.sum(-1, keepdim=True) + strength)).log()


def fit_probe(
    train: Float[Tensor, "token feature"],
    labels: Int[Tensor, " token"],
    test: Float[Tensor, "test feature"],
    *,
    groups: Int[Tensor, " token"],
    seed: int = 0,
) -> Float[Tensor, "test classes"]:
    """Returns the log-probabilities that a multinomial logistic regression gives to the classes on the test features.

    AdamW with a small weight decay starts at zero weights and takes at most `PROBE_STEPS` batches of 256 tokens. The
    loss on the last fifth of the groups is evaluated every 50 batches, or after every pass over the tokens if that is
    more. Training stops after more than `PATIENCE` evaluations without improvement and keeps the best weights. Features
    are centred and divided by their standard deviation on the training tokens (by at least a tenth of the typical one,
    so that noise of a nearly constant unit is not amplified).

    Args:
        groups: sequence of each training token; all tokens of a sequence are either trained on or evaluated.
    """
    centre, deviation = train.mean(0), train.std(0, correction=0)
    scale = deviation.clamp(min=0.1 * float(deviation.square().mean().sqrt()) + 1e-12)
    train, test = (train - centre) / scale, (test - centre) / scale
    evaluated = groups > groups.min() + (groups.max() - groups.min()) * 0.8
    trained = (~evaluated).nonzero()[:, 0] if bool(evaluated.any() & ~evaluated.all()) else torch.arange(len(labels))
    n_classes = int(labels.max()) + 1
    frequency = (torch.bincount(labels, minlength=n_classes) + 1.0) / (len(labels) + n_classes)
    weights = torch.zeros(train.shape[1], n_classes, device=train.device, requires_grad=True)
    bias = frequency.log().to(train).requires_grad_()
    adam = torch.optim.AdamW([weights, bias], lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, waited = [weights.detach().clone(), bias.detach().clone()], float("inf"), 0
    evaluated = evaluated if bool(evaluated.any()) else torch.ones_like(evaluated)
    batches = max(1, math.ceil(len(trained) / 256))
    passes = max(1, math.ceil(50 / batches))
    with torch.enable_grad():
        for _ in range(max(1, PROBE_STEPS // (passes * batches))):
            with torch.no_grad():
                loss = float(torch.nn.functional.cross_entropy(train[evaluated] @ weights + bias, labels[evaluated]))
            waited = 0 if loss < best_loss else waited + 1
            if waited == 0:
                best_loss, best = loss, [weights.detach().clone(), bias.detach().clone()]
            if waited > PATIENCE:
                break
            for _ in range(passes):
                for batch in trained[torch.randperm(len(trained), generator=generator).to(trained.device)].split(256):
                    adam.zero_grad()
                    torch.nn.functional.cross_entropy(train[batch] @ weights + bias, labels[batch]).backward()
                    adam.step()
    return (test @ best[0] + best[1]).log_softmax(-1)
