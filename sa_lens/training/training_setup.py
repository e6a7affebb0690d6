"""Setting up of a run: its data, model and optimizer, new or from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_lens.catalogue import run_folder as folder_of
from sa_lens.config import DataConfig, ModelConfig, RunConfig, to_dict, write_yaml
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss, architecture, save_and_load
from sa_lens.core.initial_model import initial_model
from sa_lens.data import PreparedData, prepare
from sa_lens.data.tokenizers import is_gguf
from sa_lens.data.whole_files import atomic_write, remove_leftovers
from sa_lens.training import checkpoints, run_folder, run_text
from sa_lens.training.gate_fit import fit_gates
from sa_lens.training.narrow_base import NarrowBase
from sa_lens.training.optimizer import adamw, allocate_averages, choose_trained, gate_names
from sa_lens.training.processes import Environment
from sa_lens.training.run_log import MetricsFile
from sa_lens.training.schedule import learning_rate, trains_ablated
from sa_lens.training.sharding import check_sharding, whole_parameters
from sa_lens.training.training_plan import holds_narrow_base

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that the training loop works on."""

    state: checkpoints.RunState
    """Steps, best loss and settings so far."""
    data: PreparedData
    """Tokens on disk."""
    model: SelfAblatingTransformer
    """The model, on the training device."""
    module: Any
    """The loss over the model, wrapped by Accelerate."""
    optimizer: Any
    """AdamW, wrapped by Accelerate."""
    text: dict[str, Any]
    """Entry of `config.json` about the text; see `run_text.record`."""
    narrow_base: NarrowBase | None
    """The frozen base, if it is held in bfloat16."""

    def exact_base(self) -> AbstractContextManager[None]:
        """Gives the model its exact weights, within the context, if its base is held in bfloat16."""
        return nullcontext() if self.narrow_base is None else self.narrow_base.exact()

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Gives every process whole and exact parameters to read, within the context, which all must enter."""
        with whole_parameters(self.module), self.exact_base():
            yield


def set_up(run: RunConfig, out: Path, accelerator: Accelerator, *, resume: bool, progress: bool) -> TrainingSetup:
    """Prepares data, model and optimizer, and opens the run folder; a resumed run starts from its last checkpoint.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit each other, the text, or the run to be resumed.
    """
    earlier = _last_checkpoint(out, run) if resume else None
    # empty if the run was killed before it recorded its text
    recorded = {**run_text.read_record(out), **(earlier[0].data if earlier is not None else {})} if resume else {}
    located, data, model = _with_its_text(run, out, recorded, progress)
    fingerprints = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    text = run_text.record(located, data, out, given=run)
    if earlier is not None:
        folder = out / "state" / f"step-{earlier[0].step}"
        save_and_load.load_weights(model, folder / save_and_load.WEIGHTS)
    choose_trained(model, run.train.freeze)
    model.to(accelerator.device, print_details=False)
    if earlier is None and run.train.fit_tokens:
        wanted = max(1, run.train.fit_tokens // run.model.n_ctx)
        fit_gates(model, data.train.blocks(run.model.n_ctx, stop=wanted))
    loss = TwoStreamLoss(
        model,
        run.loss,
        path=run.train.path,
        dtype=torch.bfloat16 if run.train.precision == "bf16" else None,
        checkpoint_activations=run.train.checkpoint_activations,
    )
    if run.train.compile:
        loss.compile()
    optimizer = adamw(model, run.train, fused=accelerator.device.type in ("cpu", "cuda"))
    module, optimizer = accelerator.prepare(loss, optimizer)
    check_sharding(module)
    if accelerator.device.type == "cpu" and accelerator.distributed_type != "FSDP":
        allocate_averages(optimizer.optimizer)
    # a sharded loss has parameters of one type
    narrow = holds_narrow_base(run) and loss.path == "fused" and accelerator.distributed_type != "FSDP"
    narrow_base = NarrowBase(model, out) if narrow else None
    environment = Environment.of(accelerator)
    if earlier is None:
        state = checkpoints.RunState(
            step=0,
            position=0,
            lr=learning_rate(0, run.train),
            seconds=0.0,
            best_loss=None,
            best_step=None,
            evaluation=None,
            window=[],
            run=to_dict(run),
            data=fingerprints,
            environment=dataclasses.asdict(environment),
        )
    else:
        before, tensors = earlier
        untouched = gate_names(model) if not trains_ablated(before.step - 1, run) else frozenset()
        checkpoints.restore_optimizer(model, optimizer.optimizer, tensors.optimizer, untouched)
        checkpoints.restore_generators(accelerator.process_index, tensors.generators)
        if different := checkpoints.differences(before.environment, dataclasses.asdict(environment)):
            log.warning("resuming under other conditions, so not bit for bit: %s", "; ".join(different))
        state = dataclasses.replace(before, run=to_dict(run), environment=dataclasses.asdict(environment))
    # every process has read the folder before one of them writes into it
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with run_folder.explain_write_errors(out):
            _open_folder(run, out, model, state, text)
    return TrainingSetup(state, data, model, module, optimizer, text, narrow_base)


def _last_checkpoint(out: Path, run: RunConfig) -> tuple[checkpoints.RunState, checkpoints.Tensors] | None:
    """Returns the last complete checkpoint of a run, or None if it was killed before the first."""
    if (out / run_folder.CONFIG_YAML).is_file():
        run_folder.check_unchanged(out, to_dict(run_folder.stored_config(out)), run)
    steps = save_and_load.complete_steps(out)
    if not steps:
        return None
    state, tensors = checkpoints.read(steps[-1])
    run_folder.check_unchanged(out, state.run, run)
    return state, tensors


def _with_its_text(
    run: RunConfig, out: Path, recorded: dict[str, Any], progress: bool
) -> tuple[RunConfig, PreparedData, SelfAblatingTransformer]:
    """The configuration with paths that lead to the run's own text, that text, and the model before its first step.

    Raises:
        ValueError: the text is not the one that the run was started with.
    """
    different: list[str] = []
    for located in run_text.candidates(run, out, recorded):
        data, model = load_text_and_model(located, progress=progress)
        different = run_text.differing_texts(data, recorded)
        if not different:
            return located, data, model
    raise ValueError(
        f"the {different[0]} text is not the one that {out} was started with (its tokens differ): restore it, or start "
        "a new run in another folder"
    )


def _open_folder(
    run: RunConfig, out: Path, model: SelfAblatingTransformer, state: checkpoints.RunState, text: dict[str, Any]
) -> None:
    for folder in (out.parent, out, out / "state"):
        remove_leftovers(folder)
    atomic_write(out / run_folder.CONFIG_YAML, lambda path: write_yaml(run, path))
    MetricsFile(out / run_folder.METRICS).drop_after(state.step)
    if not (out / save_and_load.CONFIG).is_file():
        if model.tokenizer is not None:
            save_and_load.save_tokenizer(model.tokenizer, out)
        config = {**save_and_load.describe(model), "run": to_dict(run), "text": text}
        atomic_write(out / save_and_load.CONFIG, json.dumps(config, indent=2).encode())


def load_text_and_model(run: RunConfig, *, progress: bool) -> tuple[PreparedData, SelfAblatingTransformer]:
    """Prepares tokens on disk, and the model before its first step, on the CPU.

    With `train.init` the model's shape is that model's and `model.n_ctx` the length of the training sequences; unless
    `data.tokenizer` names another, its tokenizer is used.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit each other, the text, or the model of `train.init`.
    """
    if run.train.init is None:
        # the vocabulary is not known yet, and nothing here depends on it
        sketch = architecture.hooked_config(dataclasses.replace(run.model, d_vocab=2))
        architecture.check_supported(sketch, run.gates)
        data = prepare(run.data, run.model.n_ctx, progress=progress)
        d_vocab = run.model.d_vocab if run.model.d_vocab is not None else data.d_vocab
        _check_vocabulary(data, d_vocab)
        model = SelfAblatingTransformer(
            dataclasses.replace(run.model, d_vocab=d_vocab),
            run.gates,
            data.tokenizer,
            seed=run.train.seed,
            device="cpu",
            default_padding_side="right",
        )
        return data, model
    model = initial_model(run.train.init, run.gates, seed=run.train.seed, n_ctx=run.model.n_ctx)
    if run.model.n_ctx > model.cfg.n_ctx:
        raise ValueError(
            f"model.n_ctx={run.model.n_ctx} is more than the {model.cfg.n_ctx} positions of {run.train.init}: "
            "it is the length of the training sequences, set it to that or less"
        )
    _report_unused_shape(run)
    data = prepare(data_config(run, model), run.model.n_ctx, progress=progress)
    _check_vocabulary(data, model.cfg.d_vocab)
    model.set_tokenizer(data.tokenizer, default_padding_side="right")
    return data, model


def _check_vocabulary(data: PreparedData, d_vocab: int) -> None:
    for file in (data.train, data.validation):
        file.check_vocabulary(d_vocab)


def data_config(run: RunConfig, model: SelfAblatingTransformer) -> DataConfig:
    """Returns the run's text, read with the tokenizer of `train.init` unless another one is named.

    Raises:
        ValueError: `train.init` brings no tokenizer and none is named.
    """
    if run.train.init is None or run.data.tokenizer != "bpe":
        return run.data
    base = folder_of(run.train.init)
    folder = base if base.is_dir() or is_gguf(base) else getattr(model.tokenizer, "name_or_path", None)
    if not folder:
        raise ValueError(f"train.init={run.train.init!r} brings no tokenizer: name it in data.tokenizer")
    return dataclasses.replace(run.data, tokenizer=str(folder))


def _report_unused_shape(run: RunConfig) -> None:
    usual = ModelConfig()
    given = dataclasses.replace(run.model, n_ctx=usual.n_ctx, d_vocab=None)
    unused = [f"model.{f.name}" for f in dataclasses.fields(given) if getattr(given, f.name) != getattr(usual, f.name)]
    if unused:
        log.warning("train.init=%s gives the model its shape; not used: %s", run.train.init, ", ".join(unused))
