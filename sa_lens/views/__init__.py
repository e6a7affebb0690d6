"""Figures and the records they are drawn from; a figure is a pure function of its record."""

from sa_lens.views import records
from sa_lens.views.attention import AttentionView, attention
from sa_lens.views.charts import faithfulness_chart, training_curves
from sa_lens.views.circuit import circuit_map
from sa_lens.views.coloured_text import story, unit_activations
from sa_lens.views.drawing import Figure, draw, save
from sa_lens.views.heatmap import side_by_side, to_record
from sa_lens.views.histograms import histogram, unit_histogram
from sa_lens.views.next_tokens import logit_lens, predictions
from sa_lens.views.page import View, load_scripts, view
from sa_lens.views.raster import gate_raster
from sa_lens.views.tables import comparison_table

__all__ = [
    "AttentionView",
    "Figure",
    "View",
    "attention",
    "circuit_map",
    "comparison_table",
    "draw",
    "faithfulness_chart",
    "gate_raster",
    "histogram",
    "load_scripts",
    "logit_lens",
    "predictions",
    "records",
    "save",
    "side_by_side",
    "story",
    "to_record",
    "training_curves",
    "unit_activations",
    "unit_histogram",
    "view",
]
