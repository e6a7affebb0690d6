"""A decoder-only transformer with hook points: the base of `SelfAblatingTransformer` where TransformerLens has none.

TransformerLens 4 removed `HookedTransformer`. This package is a transformer of our own on TransformerLens's
`HookedRootModule` and `HookPoint`, with the names, shapes, attributes and state dict of TransformerLens 3's class, so
that weights, hooks and tools written for one work on the other.

| file | contents |
|---|---|
| `hooked_transformer_config` | `HookedTransformerConfig`, and what this decoder refuses |
| `layers` | embeddings, normalisation, activations, MLPs |
| `attention` | attention, rotary and ALiBi positions |
| `hooked_transformer` | the block and `HookedTransformer` |
| `text` | text to tokens and back |
| `weights` | stacked weights, initial weights, weight processing |
| `generation` | sampling |

Axes: `batch`, `pos` (positions of the input), `query` and `key` (positions in attention; with a cache there are more
keys than queries), `head`, `kv_head` (heads of keys and values; fewer than `head` with grouped queries), `d_model`,
`d_head`, `d_mlp`, `d_vocab`. Vectors are rows: a layer computes `x W + b`.
"""

from sa_lens.core.decoder.hooked_transformer import HookedTransformer
from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig
from sa_lens.core.decoder.layers import Embed, Unembed

__all__ = ["Embed", "HookedTransformer", "HookedTransformerConfig", "Unembed"]
