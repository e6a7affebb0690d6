"""Sparse autoencoders: train and evaluate them with SAELens on either stream, at any hook, from token files, offline.

SAELens is optional (`pip install "sa-lens[sae]"`), needs TransformerLens 3, and is imported when one of these functions
is called. SAEs, training steps, evaluation and files are those of SAELens; this package computes the activations.

| name | what it answers | cost |
|---|---|---|
| `train_sae` | trains an SAE, and resumes its training | `laptop`: minutes on two cores |
| `evaluate_sae` | measures reconstruction, sparsity, and the loss of the model with the SAE | 3 passes over the text |
| `SAEEvaluation` | the measures that `evaluate_sae` returns | none |
| `SAESettings`, `PRESETS` | size and training of an SAE | none |
"""

from sa_lens.sae.evaluate import SAEEvaluation, evaluate_sae
from sa_lens.sae.settings import PRESETS, SAESettings
from sa_lens.sae.train import train_sae

__all__ = ["train_sae", "evaluate_sae", "SAEEvaluation", "SAESettings", "PRESETS"]  # noqa: RUF022  as a user meets them
