"""Figures and the records they are drawn from; a figure is a pure function of its record."""

from sa_lens.views import records
from sa_lens.views.attention import AttentionView, attention, view
from sa_lens.views.charts import faithfulness_chart, training_curves
from sa_lens.views.circuit import circuit_map
from sa_lens.views.drawing import Figure, draw, save
from sa_lens.views.heatmap import side_by_side, to_record

__all__ = [
    "AttentionView",
    "Figure",
    "attention",
    "circuit_map",
    "draw",
    "faithfulness_chart",
    "records",
    "save",
    "side_by_side",
    "to_record",
    "training_curves",
    "view",
]
