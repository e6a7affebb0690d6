"""The forward and backward pass of a training step on a GPU, recorded once as a CUDA graph and replayed.

A step of a small model consists of thousands of kernels, and launching one takes longer than the kernel itself. A graph
launches all of them at once. The kernels, and so the results, are the same.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import TrainConfig
from sa_lens.core import TwoStreamLoss
from sa_lens.training.run_log import term_row

WARM_UPS = 3
"""Passes before the recording, in which libraries choose their kernels and take their memory."""

log = logging.getLogger(__name__)


def records_steps(cfg: TrainConfig, loss: Any, device: torch.device, processes: int, parts: int) -> bool:
    """Returns whether steps are recorded: on one GPU, by the fused path, with one batch per step."""
    return (
        cfg.cuda_graph
        and device.type == "cuda"
        and processes == parts == 1
        and isinstance(loss, TwoStreamLoss)
        and loss.path == "fused"
        and not (cfg.compile or cfg.checkpoint_activations)
    )


class RecordedStep:
    """Computes the loss of a batch and the gradients of all parameters, by replaying a recording.

    The recording belongs to one shape of batches and to the streams that are trained; when these change, a new one is
    made. If torch cannot record the step, it runs as usual, which is logged once.
    """

    def __init__(self, loss: TwoStreamLoss) -> None:
        self._loss = loss
        self._key: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._works = True

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"], *, clean_alone: bool
    ) -> Float[Tensor, " term"]:
        """Fills `grad` of every trained parameter, and returns the terms of the loss."""
        if self._works and self._key != (tokens.shape, clean_alone):
            self._key = tokens.shape, clean_alone
            self._record(tokens, targets, clean_alone)
        if self._graph is None:
            return self._run(tokens, targets, clean_alone)
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._terms.clone()

    def _run(self, tokens: Tensor, targets: Tensor, clean_alone: bool) -> Tensor:
        terms = self._loss(tokens, targets, clean_alone=clean_alone)
        terms.total.backward()
        return term_row(terms)

    def _record(self, tokens: Tensor, targets: Tensor, clean_alone: bool) -> None:
        self._graph, self._gradients, parameters = None, [], list(self._loss.parameters())
        self._tokens, self._targets = tokens.clone(), targets.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._run(self._tokens, self._targets, clean_alone)
                self._loss.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those that load batches, may use the GPU in the meantime
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._terms = self._run(self._tokens, self._targets, clean_alone)
        except RuntimeError as error:
            self._works = False
            self._loss.zero_grad(set_to_none=True)
            log.warning("training steps are not recorded as a CUDA graph, so they are slower: %s", error)
            return
        self._graph = graph
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
