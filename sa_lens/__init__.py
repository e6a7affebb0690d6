"""Self-ablating transformers on TransformerLens.

| name | what it is |
|---|---|
| `models` | table of the models that come with the package |
| `SelfAblatingTransformer` | the model, a `HookedTransformer` with gates; `Streams` is what `run_streams` returns |
| `HookedTransformer`, `HookedTransformerConfig` | the class without gates, of TransformerLens 3 or of sa_lens |
| `ModelConfig`, `GateConfig`, `LossConfig`, `DataConfig`, `TrainConfig`, `RunConfig`, `PRESETS` | settings |
| `train`, `TwoStreamLoss`, `LossTerms` | train a model from a `RunConfig`; the loss alone, for a loop of your own |
| `circuits` | prompt pairs, activation patching, circuit discovery and faithfulness in either stream |
| `units` | what single units do: specialization, explanations, mask leakage, sparsity |
| `sae` | sparse autoencoders on either stream, with SAELens |
| `views`, `report` | figures and views; one offline page about one or several models |
| `compare` | train and measure variants over seeds: `compare("laptop", "runs/compare")` |
| `data`, `training` | text and tokens; the loop, evaluation and samples |

What needs PyTorch is imported when it is first used, so that `import sa_lens` and `sa-lens --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sa_lens.config import (
    PRESETS,
    DataConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from sa_lens import circuits, data, report, sae, training, units, views
    from sa_lens.catalogue import models
    from sa_lens.compare import compare
    from sa_lens.core import (
        HookedTransformer,
        HookedTransformerConfig,
        LossTerms,
        SelfAblatingTransformer,
        Streams,
        TwoStreamLoss,
    )
    from sa_lens.training import train

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "DataConfig",
    "GateConfig",
    "HookedTransformer",
    "HookedTransformerConfig",
    "LossConfig",
    "LossTerms",
    "ModelConfig",
    "RunConfig",
    "SelfAblatingTransformer",
    "Streams",
    "TrainConfig",
    "TwoStreamLoss",
    "__version__",
    "circuits",
    "compare",
    "data",
    "models",
    "report",
    "sae",
    "train",
    "training",
    "units",
    "views",
]

_CORE = (
    "HookedTransformer",
    "HookedTransformerConfig",
    "LossTerms",
    "SelfAblatingTransformer",
    "Streams",
    "TwoStreamLoss",
)
_HOME = {"models": "sa_lens.catalogue", "train": "sa_lens.training"} | dict.fromkeys(_CORE, "sa_lens.core")
"""Where each name that is imported late is defined; the others of `__all__` are subpackages."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sa_lens' has no attribute {name!r}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    return import_module(f"sa_lens.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
