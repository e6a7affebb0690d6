"""Self-ablating transformers on TransformerLens: the public names.

Those that need PyTorch are imported when they are first used, so that `sa-lens --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sa_lens.config import DataConfig, GateConfig, LossConfig, ModelConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from sa_lens.catalogue import models
    from sa_lens.core import LossTerms, SelfAblatingTransformer, Streams, TwoStreamLoss

__version__ = "0.1.0"

__all__ = [
    "DataConfig",
    "GateConfig",
    "LossConfig",
    "LossTerms",
    "ModelConfig",
    "RunConfig",
    "SelfAblatingTransformer",
    "Streams",
    "TrainConfig",
    "TwoStreamLoss",
    "__version__",
    "models",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("sa_lens.catalogue" if name == "models" else "sa_lens.core"), name)
    raise AttributeError(f"module 'sa_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
