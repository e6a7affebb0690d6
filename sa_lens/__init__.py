"""Self-ablating transformers on TransformerLens.

| name | what it answers | cost |
|---|---|---|
| `models` | which models come with the package | none |
| `SelfAblatingTransformer` | the model, a `HookedTransformer` with gates | |
| `Streams` | both streams of a batch, from `model.run_streams` | a clean and an ablated pass |
| `HookedTransformer`, `HookedTransformerConfig` | the class without gates, of TransformerLens 3 or of sa_lens | |
| `RunConfig` | all settings of a training run: its shape, gates, loss, text and optimisation | none |
| `ModelConfig`, `GateConfig`, `LossConfig`, `DataConfig`, `TrainConfig` | the parts of a `RunConfig` | none |
| `PRESETS` | named settings | none |
| `train` | trains a model from a `RunConfig` | minutes to days |
| `TwoStreamLoss`, `LossTerms` | the loss alone, for a loop of your own | both passes |
| `training` | what losses a model has and what it writes: evaluation, samples | seconds |
| `circuits` | which edges, heads and units carry a behaviour: patching, discovery, faithfulness | seconds to minutes |
| `units` | what single units do: specialization, explanations, mask leakage, sparsity | seconds to minutes |
| `sae` | sparse autoencoders on either stream, with SAELens | minutes to hours |
| `views` | figures of a model on a text, and of results | up to a pass per stream and layer |
| `report` | one offline page about one or several models | half a minute per small model |
| `compare` | do variants differ over seeds? `compare("laptop", "runs/compare")` | hours |
| `data` | text, tokenizers and tokens | encodes a text once |

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

__all__ = [  # noqa: RUF022 - in the order of the table
    "models",
    "SelfAblatingTransformer",
    "Streams",
    "HookedTransformer",
    "HookedTransformerConfig",
    "RunConfig",
    "ModelConfig",
    "GateConfig",
    "LossConfig",
    "DataConfig",
    "TrainConfig",
    "PRESETS",
    "train",
    "TwoStreamLoss",
    "LossTerms",
    "training",
    "circuits",
    "units",
    "sae",
    "views",
    "report",
    "compare",
    "data",
    "__version__",
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
    return list(__all__)
