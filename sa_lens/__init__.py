"""Self-ablating transformers on TransformerLens: the public names."""

from sa_lens.config import DataConfig, GateConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
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
]
