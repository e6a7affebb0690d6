"""Linear probes: what a linear reader of some features can tell of the next token, and what the token itself tells."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def smoothed_counts(
    read: list[Int[Tensor, " token"]], labels: list[Int[Tensor, " token"]]
) -> Float[Tensor, "test classes"]:
    """Log-probabilities of the test labels given the token read: `(n(x, y) + a p(y)) / (n(x) + a)`, with the strength a
    that predicts the training tokens best when each is left out in turn."""
    n_classes, n_values = int(max(part.max() for part in labels)) + 1, int(max(part.max() for part in read)) + 1
    pairs = torch.zeros(n_values, n_classes, dtype=torch.float64, device=labels[0].device)
    pairs.index_put_((read[0], labels[0]), torch.ones_like(labels[0], dtype=torch.float64), accumulate=True)
    # one more of each class, so that no probability is zero
    share = (pairs.sum(0) + 1) / (len(labels[0]) + n_classes)

    def left_out(strength: float) -> float:
        others = pairs[read[0], labels[0]] - 1 + strength * share[labels[0]]
        return float((others / (pairs[read[0]].sum(-1) - 1 + strength)).log().mean())

    best = max((1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), key=left_out)
    chosen = pairs[read[1]]
    return ((chosen + best * share) / (chosen.sum(-1, keepdim=True) + best)).log()


def fit_probe(
    train: Float[Tensor, "token feature"],
    labels: Int[Tensor, " token"],
    test: Float[Tensor, "test feature"],
    *,
    groups: Int[Tensor, " token"],
    seed: int = 0,
    steps: int = 3000,
    patience: int = 3,
) -> Float[Tensor, "test classes"]:
    """Log-probabilities of a multinomial logistic regression on the test features.

    Adam with a small weight decay from zero weights; it stops when the loss on the last fifth of the groups no longer
    falls and keeps the weights of the best judgement. Features are centred and scaled by their deviation on the
    training tokens (by at least a tenth of the typical one, so that a nearly constant unit is not blown up).

    Args:
        groups: sequence of each training token; a sequence is wholly in the fit or wholly in the stopping part.
        steps: batches of 256 tokens at most.
        patience: judgements without improvement before it stops; one every 50 batches, or every pass over the tokens if
            that is more.
    """
    centre, deviation = train.mean(0), train.std(0, correction=0)
    scale = deviation.clamp(min=0.1 * float(deviation.square().mean().sqrt()) + 1e-12)
    train, test = (train - centre) / scale, (test - centre) / scale
    stopping = groups > groups.min() + (groups.max() - groups.min()) * 0.8
    fitting = (~stopping).nonzero()[:, 0] if bool(stopping.any() & ~stopping.all()) else torch.arange(len(labels))
    n_classes = int(labels.max()) + 1
    share = (torch.bincount(labels, minlength=n_classes) + 1.0) / (len(labels) + n_classes)
    weights = torch.zeros(train.shape[1], n_classes, device=train.device, requires_grad=True)
    bias = share.log().to(train).requires_grad_()
    adam = torch.optim.AdamW([weights, bias], lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, waited = [weights.detach().clone(), bias.detach().clone()], float("inf"), 0
    judged = stopping if bool(stopping.any()) else torch.ones_like(stopping)
    batches = max(1, math.ceil(len(fitting) / 256))
    passes = max(1, math.ceil(50 / batches))
    with torch.enable_grad():
        for _ in range(max(1, steps // (passes * batches))):
            with torch.no_grad():
                loss = float(torch.nn.functional.cross_entropy(train[judged] @ weights + bias, labels[judged]))
            waited = 0 if loss < best_loss else waited + 1
            if waited == 0:
                best_loss, best = loss, [weights.detach().clone(), bias.detach().clone()]
            if waited > patience:
                break
            for _ in range(passes):
                for batch in fitting[torch.randperm(len(fitting), generator=generator).to(fitting.device)].split(256):
                    adam.zero_grad()
                    torch.nn.functional.cross_entropy(train[batch] @ weights + bias, labels[batch]).backward()
                    adam.step()
    return (test @ best[0] + best[1]).log_softmax(-1)
