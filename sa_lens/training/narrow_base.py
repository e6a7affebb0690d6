"""A frozen base in bfloat16 while its gates are trained, and its exact weights for all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sa_lens.core import SelfAblatingTransformer
from sa_lens.data.whole_files import scratch_folder
from sa_lens.training.optimizer import decays


class NarrowBase:
    """Holds the matrices and embeddings of a frozen base in bfloat16, except inside `exact()`.

    Biases and weights of normalisations keep their type: they are few, and are not read by matrix products. The exact
    weights lie in a memory-mapped file, which takes no memory where the system needs it, so that nothing that is
    evaluated, sampled or saved is rounded.

    Args:
        model: a model whose base is frozen; its parameters are changed in place.
        place: a folder for the file, which disappears when the process ends.
    """

    def __init__(self, model: SelfAblatingTransformer, place: Path) -> None:
        matrices = [parameter for name, parameter in model.named_parameters() if decays(name)]
        self._exact: list[tuple[nn.Parameter, Tensor]] = []
        with scratch_folder(place) as folder:
            path = folder / "base.bin"
            with path.open("wb") as file:
                for parameter in matrices:
                    parameter.detach().cpu().contiguous().numpy().tofile(file)
            numbers = torch.from_file(str(path), size=sum(p.numel() for p in matrices), dtype=matrices[0].dtype)
        sizes = [parameter.numel() for parameter in matrices]
        for parameter, exact in zip(matrices, numbers.split(sizes), strict=True):
            self._exact.append((parameter, exact.view(parameter.shape)))
            parameter.data = parameter.detach().to(torch.bfloat16)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Puts the exact weights into the model, within the context."""
        narrow = [parameter.data for parameter, _ in self._exact]
        for parameter, exact in self._exact:
            parameter.data = exact.to(parameter.device)
        try:
            yield
        finally:
            for (parameter, _), rounded in zip(self._exact, narrow, strict=True):
                parameter.data = rounded

    def restore(self) -> None:
        """Gives the model its exact weights back for good, in memory of their own."""
        for parameter, exact in self._exact:
            parameter.data = exact.to(parameter.device, copy=True)
        self._exact = []
