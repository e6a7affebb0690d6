"""Training: the loop, its schedule and optimizer, exact checkpoints, evaluation and samples."""

from sa_lens.stopping import Interrupted
from sa_lens.training.evaluation import Evaluation, bytes_per_token, evaluate
from sa_lens.training.loop import TrainResult, train
from sa_lens.training.metrics import TrainingDiverged
from sa_lens.training.sampling import Sample, sample, side_by_side
from sa_lens.training.schedule import learning_rate

__all__ = [
    "Evaluation",
    "Interrupted",
    "Sample",
    "TrainResult",
    "TrainingDiverged",
    "bytes_per_token",
    "evaluate",
    "learning_rate",
    "sample",
    "side_by_side",
    "train",
]
