"""Sparse autoencoders: SAELens trains and evaluates on either stream, at any hook, from token files, offline.

SAELens is an extra, `pip install "sa-lens[sae]"`, and needs TransformerLens 3. It is imported when a function here is
called. The SAEs are its own, and so are training step, evaluation and files; this package brings the activations of the
chosen stream.
"""

from sa_lens.sae.evaluate import SAEEvaluation, evaluate_sae
from sa_lens.sae.settings import PRESETS, SAESettings
from sa_lens.sae.train import train_sae

__all__ = ["PRESETS", "SAEEvaluation", "SAESettings", "evaluate_sae", "train_sae"]
