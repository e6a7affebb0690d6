"""Circuits: which edges, heads and units of a model carry a behaviour, in either stream.

All functions take an `Experiment`, or a model and pairs with the experiment's settings as keywords. They return tables
and records; figures are in `sa_lens.views`. Costs are in passes over the prompts; E is the number of edges.

| name | what it answers | cost |
|---|---|---|
| `tasks` | prompts of built-in tasks, of a JSON file | none |
| `PromptPairs` | your own prompts as texts or tokens | none |
| `Experiment` | model, pairs and settings, said once | none until used |
| `Metric`, `METRICS` | what is measured at the end of a prompt | none |
| `skill` | can the model do the task at all? | 1 pass |
| `patch` | which activation or mask, put into another prompt, restores the answer? | 1 pass per patch |
| `attribute_nodes` | which heads, MLPs and units matter? | 2 passes and 1 gradient |
| `eap` | which edges matter, roughly? | 2 passes and 1 gradient |
| `eap_ig` | the same, closer | 2 passes and `steps` gradients |
| `relp` | the same, by propagation rules | 2 passes and 1 gradient |
| `exact_effects` | what does each edge do alone? | E parts of a pass |
| `acdc`, `visiting_order` | which edges can go, one after the other, and in which order are they tried? | E parts of a pass, many together |
| `gate_circuit`, `mask_shares`, `gate_rankings` | which units do the gates keep? | 1 pass |
| `find_circuit`, `circuit_table` | which circuit does any of these methods find, judged on other prompts? several as a table | the method's, and about 40 passes |
| `faithfulness` | how much of the behaviour do a ranking's edges carry, and how many does it need? | about 40 passes |
| `MIB_SIZES` | the circuit sizes at which `faithfulness` measures, as shares of all edges | none |
| `summary_table`, `curves_table` | which ranking is the most faithful, overall and at each size? | none |
| `GapTooSmall` | the error when clean prompts and the empty circuit score too much alike | |
| `completeness`, `minimality` | is anything missing, is anything idle? | 1 or 2 passes per set |
| `agreement`, `agreement_table` | do two circuits agree? | none |
| `Circuit`, `Graph` | edges with scores: tables, files, set operations | none |
| `run_circuit` | logits when only a circuit's edges carry the prompt | 2 passes |

With live masks in the ablated stream `acdc` tries nearly every edge; if the gates also read the end of the clean stream
or the ablated stream, `acdc` and `exact_effects` run more of the model for each.
"""  # noqa: E501

from sa_lens.circuits import tasks
from sa_lens.circuits.discovery.acdc import acdc, visiting_order
from sa_lens.circuits.discovery.eap import eap, eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.discovery.gate_circuit import gate_circuit, gate_rankings, mask_shares
from sa_lens.circuits.discovery.relp import relp
from sa_lens.circuits.experiment import Experiment, skill
from sa_lens.circuits.find_and_judge import circuit_table, find_circuit
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.agreement import agreement, agreement_table
from sa_lens.circuits.judging.circuit_metric import GapTooSmall
from sa_lens.circuits.judging.completeness import completeness, minimality
from sa_lens.circuits.judging.faithfulness import MIB_SIZES, faithfulness
from sa_lens.circuits.judging.faithfulness_curve import curves_table, summary_table
from sa_lens.circuits.metrics import METRICS, Metric
from sa_lens.circuits.patching.activation_patching import patch
from sa_lens.circuits.patching.node_attribution import attribute_nodes
from sa_lens.circuits.running.circuit_by_hooks import run_circuit
from sa_lens.circuits.tasks.pairs import PromptPairs

__all__ = [  # noqa: RUF022 - in the order of the table
    "tasks",
    "PromptPairs",
    "Experiment",
    "Metric",
    "METRICS",
    "skill",
    "patch",
    "attribute_nodes",
    "eap",
    "eap_ig",
    "relp",
    "exact_effects",
    "acdc",
    "visiting_order",
    "gate_circuit",
    "mask_shares",
    "gate_rankings",
    "find_circuit",
    "circuit_table",
    "faithfulness",
    "MIB_SIZES",
    "summary_table",
    "curves_table",
    "GapTooSmall",
    "completeness",
    "minimality",
    "agreement",
    "agreement_table",
    "Circuit",
    "Graph",
    "run_circuit",
]
