"""Figures and the records they are drawn from; a figure is a pure function of its record."""

from sa_lens.views import records
from sa_lens.views.attention import AttentionView, attention, view
from sa_lens.views.charts import training_curves
from sa_lens.views.drawing import draw, save
from sa_lens.views.heatmap import side_by_side, to_record

__all__ = [
    "AttentionView",
    "attention",
    "draw",
    "records",
    "save",
    "side_by_side",
    "to_record",
    "training_curves",
    "view",
]
