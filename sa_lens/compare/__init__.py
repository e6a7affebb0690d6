"""Comparison of models that are trained under equal conditions: variants and seeds, one table, verdicts by a fixed rule.

| name | what it answers | cost |
|---|---|---|
| `compare` | train and measure what is not on disk yet, write the table: `compare("laptop", "runs/compare")` | hours; see `plan` |
| `plan` | what `compare` would do, with estimated times | seconds |
| `GRIDS`, `Grid`, `Variant` | what is trained: named grids, a grid or a variant of your own | |
| `Losses`, `Weights`, `Skill`, `Learning`, `ACDC`, `Faithfulness`, `Units`, `Labels`, `Explanations`, `Leakage`, `SAE` | what is measured: the fields are settings | seconds to minutes per model |
| `Measurement`, `TrainedModel`, `Result` | a measurement of your own: what it is, what it gets, what it returns | |
| `COLUMNS`, `Column` | columns of the table: labels, and the claims about them | |
| `Comparison` | the results: `.values`, `.summary()`, `.learning`, `.notes` | |
| `learning_curves` | loss and skill during training, as a record that `sa_lens.views.show` draws | |
| `MATCHED` | for `.summary(MATCHED)`: differences from the dense model with the nearest loss | |
| `tables`, `difference_tables`, `verdict_table`, `verdict_text` | the tables in print; `sa_lens.views.show` draws the figure | |
| `write` | all files of tables and figure | seconds |
"""  # noqa: E501

import sys
from types import ModuleType

import sa_lens.compare.comparison_figure  # noqa: F401 - `draw` learns to draw a comparison
from sa_lens.compare.columns import COLUMNS, Column
from sa_lens.compare.grids import GRIDS, Grid, Variant
from sa_lens.compare.learning import Learning, learning_curves
from sa_lens.compare.markdown_latex import difference_tables, tables, verdict_table, verdict_text, write
from sa_lens.compare.measurement import Measurement, Result, TrainedModel
from sa_lens.compare.model_measurements import SAE, Losses, Weights
from sa_lens.compare.run_grid import compare, plan
from sa_lens.compare.task_measurements import ACDC, Faithfulness, Skill
from sa_lens.compare.unit_measurements import Explanations, Labels, Leakage, Units
from sa_lens.compare.verdicts import MATCHED, Comparison

__all__ = [  # noqa: RUF022 - in the order of the table
    "compare",
    "plan",
    "GRIDS",
    "Grid",
    "Variant",
    "Losses",
    "Weights",
    "Skill",
    "Learning",
    "ACDC",
    "Faithfulness",
    "Units",
    "Labels",
    "Explanations",
    "Leakage",
    "SAE",
    "Measurement",
    "TrainedModel",
    "Result",
    "COLUMNS",
    "Column",
    "Comparison",
    "learning_curves",
    "MATCHED",
    "tables",
    "difference_tables",
    "verdict_table",
    "verdict_text",
    "write",
]


class _CallablePackage(ModuleType):
    """`sa_lens.compare(...)` calls the function of this name; the package itself stays importable."""

    __call__ = staticmethod(compare)


sys.modules[__name__].__class__ = _CallablePackage
