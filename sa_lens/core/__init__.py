"""The gates, the two streams, the model, its losses, and its files."""

from sa_lens.core.losses import LossTerms, TwoStreamLoss
from sa_lens.core.model import SelfAblatingTransformer, Streams

__all__ = ["LossTerms", "SelfAblatingTransformer", "Streams", "TwoStreamLoss"]
