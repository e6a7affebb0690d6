"""What single units do: firing, tokens, labels, snippets, explanations, leakage through the masks, and sparsity.

A unit is an attention unit or a neuron, written `L1.mlp.17`. Every function takes any `HookedTransformer` and reads the
clean stream, and the ablated one if the model has gates. Cost is in passes of the model over the text.

| name | what it answers | cost |
|---|---|---|
| `Unit`, `Sublayer`, `unit_counts` | which units a model has, and their names | none |
| `stream_units` | the values and masks of all units, batch by batch | 1 pass |
| `calibrate` -> `Thresholds` | from which value on a unit fires | 1 pass |
| `specialization` | how often, on which tokens and with which other units each unit fires | 1 pass |
| `word_classes` | coarse classes of tokens, for texts without labels | none |
| `summary` | means over a model's units, with intervals | none |
| `compare` | whether two models' units differ at equal layer and activity | none |
| `label_stories`, `selectivity` | which label of generated stories each unit follows | 1 pass |
| `snippets` | text on which a unit is most active, and a sample of the rest | 2 passes |
| `explain` | in which contexts a unit fires, judged on other text | 2 passes, and about 24,000 tokens per unit |
| `ChatModel`, `explain_by_chat` | the same in words, by a language model behind an endpoint | 12 calls per unit |
| `leakage` | how much of the ablated stream's skill its masks alone carry | about 5 passes, and linear probes |
| `sparsity` | how sparse the weights are, also by measures that no rescaling changes | none |
| `activation_sparsity` | how sparse the units are at a token | 1 pass |
| `effective_connections` | how many weights belong to live units | none |
"""

from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.units.activations import stream_units
from sa_lens.units.comparison import compare, summary
from sa_lens.units.explanations import explain
from sa_lens.units.firing import Thresholds, calibrate
from sa_lens.units.labels import label_stories, selectivity
from sa_lens.units.language_model import ChatModel, explain_by_chat
from sa_lens.units.mask_leakage import leakage
from sa_lens.units.sparsity_tables import activation_sparsity, effective_connections, sparsity
from sa_lens.units.unit_tables import specialization, word_classes
from sa_lens.units.windows import snippets

__all__ = [  # noqa: RUF022  in the order in which a user meets them
    "Unit",
    "Sublayer",
    "unit_counts",
    "stream_units",
    "calibrate",
    "Thresholds",
    "specialization",
    "word_classes",
    "summary",
    "compare",
    "label_stories",
    "selectivity",
    "snippets",
    "explain",
    "ChatModel",
    "explain_by_chat",
    "leakage",
    "sparsity",
    "activation_sparsity",
    "effective_connections",
]
