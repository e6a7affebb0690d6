"""`Experiment`: a model and pairs of prompts, with all settings that an analysis of circuits needs.

Every function of `sa_lens.circuits` that analyses a model takes an experiment. For a single call you can also give the
model, the pairs and the settings: `eap(model, pairs, stream="ablated")` means `eap(Experiment(model, pairs,
stream="ablated"))`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.graph import Graph, edge_hook_names
from sa_lens.circuits.metrics import METRICS, SKILL_BAR, Metric
from sa_lens.circuits.running.recorded_passes import PassesOfPairs, last_logits, passes_of_pairs
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Ablation, Masks, Stream, check_choice
from sa_lens.core.freed_memory import kept_freed_memory
from sa_lens.core.host import Hook, Host, device_of, in_stream, refuse_chosen_stream, require_hooks, streams_of
from sa_lens.core.last_position import why_not_by_nodes
from sa_lens.core.live_gates import why_not_local_gates
from sa_lens.core.nodes import NodeFunctions
from sa_lens.statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

WIDE = 512
"""Smallest d_model at which analyses on a CPU keep the memory that they free; in smaller models this saves no time."""

MEMORY = 2**29
"""Largest size in bytes of the recorded passes that an experiment keeps; larger ones are recorded for each analysis."""

SETTINGS = ("stream", "metric", "ablation", "masks", "batch_size", "seed", "device")


class Experiment:
    """A model, pairs of prompts, and how they are run and measured.

    What several analyses need is recorded when it is first used: logits of the unedited prompts, what every node writes
    on both prompts, masks, and the metric of circuits that were run. The model must not change in the meantime;
    `release()` deletes the records.

    Args:
        model: any model with TransformerLens's hook points.
        pairs: pairs of clean and corrupt prompts.
        stream: `clean`, or the `ablated` one of a model with gates, as in `model.ablated(position=-1)`.
        metric: name of a metric in `METRICS`, a `Metric`, or a function of the logits at the last position and the
            pairs that returns one value per pair, where larger is better. None takes the usual metric of each method:
            `kl` for ACDC, `logit_difference` for all others.
        ablation: what an ablated edge or unit carries; see `sa_lens.config.Ablation`. Biases of attention outputs
            belong to no node and are never ablated.
        masks: in the ablated stream, `live`: the gates choose again under the same edits, from a clean pass with the
            clean stream's own values (gates with scores `ablated`: from the edited pass itself). `frozen`: the masks of
            the unedited prompt stay; they name the units that this prompt needs, which no edge then has to carry. None
            takes `live`, except for methods that only have the frozen form (`relp`, `attribute_nodes`). Every result
            names its masks.
        batch_size: number of prompts in one pass, four times as many where only a few activations are kept. Memory
            grows with it.
        seed: seed of all that is drawn at random: bootstrap samples, random sets of edges, random masks.
        device: device to move the model to; None leaves it where it is.

    Raises:
        ValueError: a choice is unknown, masks are given for the clean stream, the ablated stream is asked of a model
            without gates, or the pairs do not fit the model.
    """

    def __init__(
        self,
        model: Host,
        pairs: PromptPairs,
        *,
        stream: Stream = "clean",
        metric: str | Metric | Callable[..., Any] | None = None,
        ablation: Ablation = "resample",
        masks: Masks | None = None,
        batch_size: int = 64,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        refuse_chosen_stream(model, "An analysis of circuits")
        if device is not None:
            model.to(device)  # type: ignore[attr-defined]
        check_choice("ablation", ablation, Ablation)
        if masks is not None:
            check_choice("masks", masks, Masks)
        if stream == "clean" and masks is not None:
            raise ValueError(f"masks={masks!r} needs stream='ablated': gates do not act in the clean stream")
        with in_stream(model, stream, position=-1):
            pass
        pairs.check_fits(model.cfg, batch_size)
        self.model, self.pairs = model, pairs
        self.stream: Stream = stream
        self.metric = Metric.named("logit_difference" if metric is None else metric)
        self.ablation: Ablation = ablation
        self.masks: Literal["none", "frozen", "live"] = "none" if stream == "clean" else masks or "live"
        self.batch_size, self.seed = batch_size, seed
        self._settings: dict[str, Any] = {
            **{"stream": stream, "metric": metric, "ablation": ablation, "masks": masks},
            **{"batch_size": batch_size, "seed": seed},
        }
        self._records: dict[Any, Any] = {}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.about.items())
        return f"<Experiment {type(self.model).__name__}, {settings}>"

    def on(self, pairs: PromptPairs) -> Experiment:
        """Returns the same experiment on other pairs, such as those that a circuit is judged on."""
        return self.replace(pairs=pairs)

    def on_few(self, n: int) -> Experiment:
        """Returns the same experiment on at most n of its pairs, evenly spread; the functions of nodes are shared."""
        n = min(n, len(self.pairs))
        few = self.on(self.pairs.subset([i * len(self.pairs) // n for i in range(n)]))
        few._records["nodes"] = self.nodes
        return few

    def replace(self, **changes: Any) -> Experiment:
        """Returns the same experiment with another `model`, other `pairs` or other settings."""
        model, pairs = changes.pop("model", self.model), changes.pop("pairs", self.pairs)
        return Experiment(model, pairs, **{**self._settings, **changes})

    def fill_in(self, *, metric: str | None = None, masks: Masks | None = None) -> Experiment:
        """Returns the experiment with a method's usual settings where the user gave none; both share all records."""
        usual = {"metric": metric, "masks": masks if self.stream == "ablated" else None}
        changes = {name: value for name, value in usual.items() if value and self._settings[name] is None}
        if not changes:
            return self
        changed = self.replace(**changes)
        changed._records = self._records
        return changed

    @property
    def about(self) -> dict[str, Any]:
        """Task, number of pairs and settings, which tables and files contain."""
        return {
            **{"task": self.pairs.task, "n": len(self.pairs), "metric": self.metric.name},
            **{"stream": self.stream, "masks": self.masks, "ablation": self.ablation},
        }

    @cached_property
    def graph(self) -> Graph:
        """The model's graph of nodes and edges.

        Raises:
            ValueError: in this architecture the outputs of nodes do not simply add up, or hook points are missing.
        """
        require_hooks(self.model, edge_hook_names(self.model))
        return Graph.from_model(self.model)

    @property
    def light_batch_size(self) -> int:
        """Number of prompts in one pass if only a few of its activations are kept."""
        return 4 * self.batch_size

    # --------------------------------------------------------------------------------------------------------- records

    def record(self, key: Any, make: Callable[[], T]) -> T:
        """Returns what `make` returned at the first call with this key; the record is kept until `release()`."""
        if key not in self._records:
            # outside of inference mode, so that passes with gradients can use it too
            with torch.inference_mode(False), torch.no_grad():
                self._records[key] = make()
        return cast(T, self._records[key])

    def release(self) -> None:
        """Deletes all records."""
        self._records.clear()

    def logits(self, prompt: Literal["clean", "corrupt"] = "clean") -> Float[Tensor, "pair d_vocab"]:
        """Returns the logits at the end of each unedited prompt."""
        size = self.light_batch_size
        return self.record(
            f"{prompt} logits", lambda: last_logits(self.model, self.pairs, self.stream, prompt, batch_size=size)
        )

    def values(self, logits: Float[Tensor, "pair d_vocab"]) -> Float[Tensor, " pair"]:
        """Returns the metric of each pair, in float64 on the CPU."""
        clean = self.logits() if self.metric.needs_clean_logits else None
        return self.metric(logits, self.pairs, clean).detach().double().cpu()

    @property
    def nodes(self) -> NodeFunctions:
        """The nodes of the model as plain functions."""
        return self.record("nodes", lambda: NodeFunctions(self.model, int(self.pairs.lengths.max())))

    @property
    def passes(self) -> list[PassesOfPairs]:
        """Unedited passes of both prompts, node by node."""
        if "passes" in self._records:
            return cast(list[PassesOfPairs], self._records["passes"])
        with torch.inference_mode(False), torch.no_grad():
            passes = passes_of_pairs(*(self.model, self.nodes, self.pairs), self.ablation, self.stream, self.batch_size)
        size = sum(x.nbytes for batch in passes for lane in batch.carried.values() for x in lane)
        return passes if 3 * size > MEMORY else self.record("passes", lambda: passes)

    # --------------------------------------------------------------------------------------------------- edited passes

    @property
    def edits_clean_pass(self) -> bool:
        """Whether edits are made in a clean pass too, because live gates read it."""
        return self.masks == "live" and not self.model.gates.reads_ablated  # type: ignore[attr-defined]

    def in_edited_pass(
        self, masks: Masks | Mapping[str, Tensor] | None, clean_hooks: Sequence[Hook] = ()
    ) -> AbstractContextManager[Any]:
        """Runs the model in the pass that is edited, within the context.

        Args:
            masks: frozen masks; None: those of live gates.
            clean_hooks: edits of the clean pass that live gates read; see `edits_clean_pass`.
        """
        if masks is None and self.masks == "live" and not self.edits_clean_pass:
            masks = "live"
        return in_stream(self.model, self.stream, position=-1, masks=masks, clean_hooks=clean_hooks)

    # ------------------------------------------------------------------------------------------------------ fast paths

    @property
    def why_not_by_nodes(self) -> str | None:
        """Why every pass must run the whole model under hooks; None if nodes can be run one by one."""
        return why_not_by_nodes(self.model)

    @property
    def why_not_in_part(self) -> str | None:
        """Why each removed edge needs a pass of its own; None if many can be tried at once."""
        return self.why_not_by_nodes or (why_not_local_gates(self.model) if self.masks == "live" else None)

    @property
    def level_of_slow_runs(self) -> int:
        """Level at which `why_not_in_part` is logged; with live masks, which are the default, it is not a warning."""
        return logging.INFO if self.masks == "live" else logging.WARNING

    # ----------------------------------------------------------------------------------------------------------- skill

    def skill(self) -> pd.DataFrame:
        """Measures how well the stream does the task: accuracies and logit difference with 95 % intervals.

        Returns:
            One row: task, stream, n, then pair accuracy, top-1 accuracy and logit difference, each with `_low` and
            `_high`, and `able`, which is True for a pair accuracy of at least 0.8.
        """
        import pandas as pd

        row: dict[str, Any] = {"task": self.pairs.task, "stream": self.stream, "n": len(self.pairs)}
        for name in ("pair_accuracy", "top1_accuracy", "logit_difference"):
            row |= bootstrap_interval(METRICS[name](self.logits(), self.pairs), seed=self.seed).columns(name)
        row["able"] = row["pair_accuracy"] >= SKILL_BAR
        return pd.DataFrame([row])


def skill(model: Host, pairs: PromptPairs, stream: Stream | None = None, *, seed: int = 0) -> pd.DataFrame:
    """Measures how well the model does the task: one row of `Experiment.skill` per stream.

    Args:
        stream: one stream; None takes all streams that the model has.
        seed: seed of the bootstrap.
    """
    import pandas as pd

    tables = [Experiment(model, pairs, stream=chosen, seed=seed).skill() for chosen in streams_of(model, stream)]
    return pd.concat(tables, ignore_index=True)


class Analysis(Protocol[P, R_co]):
    """A function that takes an experiment, or a model and pairs with the experiment's settings as keywords."""

    __name__: str

    @overload
    def __call__(self, exp: Experiment, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(self, model: Host, pairs: PromptPairs, /, *args: Any, **kwargs: Any) -> R_co: ...


def analysis(function: Callable[Concatenate[Experiment, P], R]) -> Analysis[P, R]:
    """Lets a function that takes an experiment also take a model, pairs and settings.

    With a wide model on a CPU the function runs in `kept_freed_memory`.
    """

    @wraps(function)
    def call(exp: Any, *args: Any, **options: Any) -> R:
        if not isinstance(exp, Experiment):
            if not args or not isinstance(args[0], PromptPairs):
                raise TypeError(
                    f"{function.__name__} takes an Experiment, or a model and PromptPairs with the settings of "
                    f"Experiment as keywords; got {type(exp).__name__} first"
                )
            settings = {name: options.pop(name) for name in SETTINGS if name in options}
            exp, args = Experiment(exp, args[0], **settings), args[1:]
        model = exp.model
        with kept_freed_memory(kept=model.cfg.d_model >= WIDE and device_of(model).type == "cpu"):
            return function(exp, *args, **options)

    return cast(Analysis[P, R], call)
