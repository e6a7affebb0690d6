"""Train a model, resume a run exactly, evaluate a model, and draw text from both streams.

| name | what it answers | cost |
|---|---|---|
| `train` -> `TrainResult` | trains a model into a run folder, or resumes it bit for bit | minutes to days |
| `plan` -> `TrainingPlan` | what a run would do: model, gates, types, memory | none |
| `fit_gates` | gates that begin near the largest units of a pretrained model | a pass over some text |
| `load_run` | the model of a run folder, a shipped name or a Hub id, on a device | seconds |
| `text_of_run` | training and validation text of a run, in its tokens | seconds, once |
| `evaluate_run`, `evaluation_table` | losses of a run's model on its own or another text; as a table | seconds |
| `evaluate` -> `Evaluation` | losses of a model on blocks of tokens | seconds |
| `bytes_per_token` | bytes of text per token of a file, which `evaluate` needs | none |
| `sample` -> `Sample` | a prompt continued in both streams with the same random draws | seconds |
| `learning_rate` | the learning rate of a step | none |
| `Interrupted`, `TrainingDiverged` | what `train` raises when it is stopped, or when a loss is no longer finite | |
"""

from sa_lens.stopping import Interrupted
from sa_lens.training.eval_printout import evaluation_table
from sa_lens.training.evaluation import Evaluation, bytes_per_token, evaluate, evaluate_run
from sa_lens.training.gate_fit import fit_gates
from sa_lens.training.loop import TrainResult, train
from sa_lens.training.run_log import TrainingDiverged
from sa_lens.training.sampling import Sample, sample
from sa_lens.training.schedule import learning_rate
from sa_lens.training.trained_run import load_run, text_of_run
from sa_lens.training.training_plan import TrainingPlan, plan

__all__ = [  # noqa: RUF022 - in the order of the table
    "train",
    "TrainResult",
    "plan",
    "TrainingPlan",
    "fit_gates",
    "load_run",
    "text_of_run",
    "evaluate_run",
    "evaluation_table",
    "evaluate",
    "Evaluation",
    "bytes_per_token",
    "sample",
    "Sample",
    "learning_rate",
    "Interrupted",
    "TrainingDiverged",
]
