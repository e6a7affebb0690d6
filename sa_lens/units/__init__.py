"""What single units do: specialization, explanations, leakage through masks, and sparsity; tables and records."""

from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.units.activations import stream_units
from sa_lens.units.comparison import compare, summary
from sa_lens.units.explanations import Explanation, Explanations, explain
from sa_lens.units.firing import Thresholds, calibrate
from sa_lens.units.labels import LabelledText, Selectivity, label_stories, selectivity
from sa_lens.units.language_model import ChatModel, explain_by_chat
from sa_lens.units.mask_leakage import Leakage, leakage
from sa_lens.units.sparsity_tables import activation_sparsity, effective_connections, sparsity
from sa_lens.units.unit_tables import Specialization, TokenClasses, specialization, word_classes
from sa_lens.units.windows import Snippets, snippets

__all__ = [
    "ChatModel",
    "Explanation",
    "Explanations",
    "LabelledText",
    "Leakage",
    "Selectivity",
    "Snippets",
    "Specialization",
    "Sublayer",
    "Thresholds",
    "TokenClasses",
    "Unit",
    "activation_sparsity",
    "calibrate",
    "compare",
    "effective_connections",
    "explain",
    "explain_by_chat",
    "label_stories",
    "leakage",
    "selectivity",
    "snippets",
    "sparsity",
    "specialization",
    "stream_units",
    "summary",
    "unit_counts",
    "word_classes",
]
