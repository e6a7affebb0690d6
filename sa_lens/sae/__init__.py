"""Sparse autoencoders: SAELens trains and evaluates on either stream, at any hook, from token files, offline.

SAELens is an extra, `pip install "sa-lens[sae]"`, and needs TransformerLens 3. It is imported when a function here is
called. The SAEs are its own, and so are training step, evaluation and files; this package brings the activations of the
chosen stream.

| name | what it answers | cost |
|---|---|---|
| `PRESETS`, `SAESettings` | which settings of an SAE and its training there are | none |
| `train_sae` | which features a hook's activations consist of: trains an SAE | minutes to hours |
| `evaluate_sae` -> `SAEEvaluation` | how sparse and how faithful an SAE is on a text | some passes over the text |
"""

from sa_lens.sae.evaluate import SAEEvaluation, evaluate_sae
from sa_lens.sae.settings import PRESETS, SAESettings
from sa_lens.sae.train import train_sae

__all__ = [  # noqa: RUF022 - in the order of the table
    "PRESETS",
    "SAESettings",
    "train_sae",
    "evaluate_sae",
    "SAEEvaluation",
]
