"""Which of the models that a training evaluates the run folder keeps."""

from __future__ import annotations

from sa_lens.config import RunConfig
from sa_lens.training.evaluation import Evaluation
from sa_lens.training.schedule import trains_ablated


def selection_loss(evaluation: Evaluation) -> float:
    """Returns the loss by which models are compared: the ablated stream's, or the clean stream's without gates."""
    return evaluation.clean_loss if evaluation.ablated_loss is None else evaluation.ablated_loss


def is_best(evaluation: Evaluation, step: int, run: RunConfig, best_loss: float | None) -> bool:
    """Returns whether the model is better than all before it.

    A model with gates counts only once its ablated stream is being trained.

    Args:
        evaluation: of the model after `step` optimizer steps.
        best_loss: the lowest `selection_loss` so far; None: no model counted yet.
    """
    if run.gates.gated and not trains_ablated(step - 1, run):
        return False
    return best_loss is None or selection_loss(evaluation) < best_loss
