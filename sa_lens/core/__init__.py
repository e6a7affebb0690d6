"""The gates, the two streams, the model, its losses, and its files."""

from sa_lens.core.base import HookedTransformer, HookedTransformerConfig
from sa_lens.core.losses import LossTerms, TwoStreamLoss
from sa_lens.core.model import SelfAblatingTransformer, Streams

__all__ = [
    "HookedTransformer",
    "HookedTransformerConfig",
    "LossTerms",
    "SelfAblatingTransformer",
    "Streams",
    "TwoStreamLoss",
]
