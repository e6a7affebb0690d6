"""The model with its gates and its two streams, the training loss, and models as files.

| name | what it answers | cost |
|---|---|---|
| `SelfAblatingTransformer` | the model: a `HookedTransformer` with top-k gates | |
| `Streams` | both streams of a batch, from `model.run_streams` | a clean and an ablated pass |
| `TwoStreamLoss` -> `LossTerms` | the training loss, by the fused path where the architecture allows it | both passes |
| `Gate` | the module that decides which units of a layer stay | |
| `export` | functions that write a model for other programs: `to_hooked`, `to_hf`, `to_reference` | seconds |
| `Host` | the protocol by which analyses speak to a model | |
| `in_stream`, `streams_of` | choose a stream of any model; the streams that a model has | none |
| `HookedTransformer`, `HookedTransformerConfig` | the plain transformer and its shape, on TransformerLens 3 and 4 | |
"""

from sa_lens.core import export
from sa_lens.core.base import HookedTransformer, HookedTransformerConfig
from sa_lens.core.gate import Gate
from sa_lens.core.host import Host, in_stream, streams_of
from sa_lens.core.losses import LossTerms, TwoStreamLoss
from sa_lens.core.model import SelfAblatingTransformer, Streams

__all__ = [  # noqa: RUF022 - in the order of the table
    "SelfAblatingTransformer",
    "Streams",
    "TwoStreamLoss",
    "LossTerms",
    "Gate",
    "export",
    "Host",
    "in_stream",
    "streams_of",
    "HookedTransformer",
    "HookedTransformerConfig",
]
