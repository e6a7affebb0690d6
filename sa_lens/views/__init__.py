"""Pictures of what a model does on a text, and of what an analysis found.

A call makes a **record**, a frozen dataclass of numbers and texts; `show` shows it and `save` saves it, as a page, an
image, or JSON. In the order in which one meets them:

| name | what it answers | cost |
|---|---|---|
| `show(x)` | shows a record, a circuit, a table of patches or a picture, in the notebook or a browser | none |
| `save(x, path)` | writes it as `.html` (one file, no network), `.png`, `.svg`, `.json`, ... | a browser for images |
| `read(path)` | the record of a `.json` that `save` wrote | none |
| `draw(x)` -> `Figure` | the picture itself, a plotly figure or a page of HTML, to change before it is saved | none |
| `side_by_side([x, y])` | heat maps or circuits on one colour scale | none |
| `explore(model, prompt)` -> `Explorer` | all about a prompt on one page, live in a notebook | one pass per stream |
| `story(model, text)` | where do masks change, and what does each token cost in each stream? | one pass per stream |
| `predictions(model, text)` | what does each stream expect after each token? | one pass per stream |
| `logit_lens(model, text)` | what would the residual stream predict after each layer? | one pass per layer and stream |
| `gate_raster(model, text)` | which units stay at which token? | one pass per stream |
| `attention(model, text, layer)` | where do heads look in each stream, and how do they differ? | one pass per stream |
| `unit_activations(model, text)` | on which tokens are a layer's most active units active? | one pass per stream |
| `unit_histogram(model, blocks, unit)` | how often has a unit which value, in each stream? | one reading of the text |
| `histogram(values, title, x_title)` | the same for any numbers | none |
| `heat_map(values, title)` | any numbers in rows and columns, such as one per head and layer | none |
| `patch_map(table)` | where does patching change the answer? | none |
| `circuit_map(circuit)` | which edges does a circuit have? | none |
| `faithfulness_chart(curves)` | how much of the model's effect does a circuit of each size keep? | none |
| `training_curves(runs)` | how did the losses of runs fall? | none |
| `comparison_table(table, title)` | any table of results, intervals beside their values | none |
| `load_scripts()` | puts the scripts of all views into one cell of a notebook | none |
"""

# isort: off
from sa_lens.views.drawing import Figure, draw, save, show, side_by_side
from sa_lens.views.html_page import load_scripts
from sa_lens.views.records import read
from sa_lens.views.coloured_text import story
from sa_lens.views.next_tokens import logit_lens, predictions
from sa_lens.views.raster import gate_raster
from sa_lens.views.heads_and_units import attention, unit_activations
from sa_lens.views.charts import faithfulness_chart, histogram, training_curves, unit_histogram
from sa_lens.views.heat_maps import heat_map, patch_map
from sa_lens.views.circuit_figure import circuit_map
from sa_lens.views.explorer import Explorer, explore
from sa_lens.views.result_tables import comparison_table

__all__ = [  # noqa: RUF022 - in the order of the table
    "show",
    "save",
    "read",
    "draw",
    "Figure",
    "side_by_side",
    "explore",
    "Explorer",
    "story",
    "predictions",
    "logit_lens",
    "gate_raster",
    "attention",
    "unit_activations",
    "unit_histogram",
    "histogram",
    "heat_map",
    "patch_map",
    "circuit_map",
    "faithfulness_chart",
    "training_curves",
    "comparison_table",
    "load_scripts",
]
