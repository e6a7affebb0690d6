"""Comparison of models trained under equal conditions: variants and seeds, one table, verdicts by a fixed rule.

`compare("laptop", "runs/compare")` trains and measures what is not on disk yet and writes the table; see
docs/compare.md.
"""

import sys
from types import ModuleType

from sa_lens.compare.comparing import compare, plan
from sa_lens.compare.grids import GRIDS, Grid, Variant
from sa_lens.compare.results import Comparison

__all__ = ["GRIDS", "Comparison", "Grid", "Variant", "compare", "plan"]


class _CallablePackage(ModuleType):
    """`sa_lens.compare(...)` calls the function of this name; the package itself stays importable."""

    __call__ = staticmethod(compare)


sys.modules[__name__].__class__ = _CallablePackage
