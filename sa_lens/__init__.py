"""Self-ablating transformers on TransformerLens: the public names."""

from sa_lens.config import GateConfig, LossConfig, ModelConfig, RunConfig

__version__ = "0.1.0"

__all__ = ["GateConfig", "LossConfig", "ModelConfig", "RunConfig", "__version__"]
