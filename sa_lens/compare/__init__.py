"""Comparison of models trained under equal conditions: variants and seeds, one table, verdicts by a fixed rule.

`compare("laptop", "runs/compare")` trains and measures what is not on disk yet and writes the table; see
docs/compare.md.
"""

from sa_lens.compare.comparing import compare, plan
from sa_lens.compare.grids import GRIDS, Grid, Variant
from sa_lens.compare.results import Comparison

__all__ = ["GRIDS", "Comparison", "Grid", "Variant", "compare", "plan"]
