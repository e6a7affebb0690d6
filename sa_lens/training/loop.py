"""The training loop, to be read from top to bottom: evaluate, save, test whether to stop, step, log."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa_lens.config import RunConfig, to_dict
from sa_lens.core import SelfAblatingTransformer, save_and_load
from sa_lens.core.freed_memory import kept_freed_memory
from sa_lens.core.save_and_load import complete_steps
from sa_lens.data import ProcessPositions, training_loader, validation_blocks
from sa_lens.data.sources import path_of
from sa_lens.launching import check_processes
from sa_lens.places import output_folder
from sa_lens.stopping import Interrupted, StopRequest, stop_requests
from sa_lens.training import checkpoints, run_folder
from sa_lens.training.best_model import is_best, selection_loss
from sa_lens.training.evaluation import Evaluation, bytes_per_token, evaluate
from sa_lens.training.processes import (
    LostProcess,
    check_device,
    check_tracker,
    is_lost_connection,
    micro_batches,
    open_accelerator,
)
from sa_lens.training.recorded_step import RecordedStep, records_steps
from sa_lens.training.run_log import MetricsFile, TrainingDiverged, Window, term_names, term_row
from sa_lens.training.sampling import Sample, sample
from sa_lens.training.schedule import learning_rate, trains_ablated
from sa_lens.training.sharding import whole_tensor
from sa_lens.training.training_plan import known_without_weights, plan
from sa_lens.training.training_setup import TrainingSetup, set_up

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run."""

    folder: Path
    """The run folder; `SelfAblatingTransformer.from_pretrained(folder)` loads its best model."""
    model: SelfAblatingTransformer
    """The model after the last step, on the training device."""
    steps: int
    """Optimizer steps taken, those before a resume included."""
    best_loss: float
    """Lowest validation loss of the ablated stream (clean without gates), nats per token."""
    best_step: int
    """Step at which it was reached."""
    evaluation: Evaluation
    """The last evaluation."""
    sample: Sample | None
    """Text from both streams; None if `train.sample_tokens` is 0."""
    seconds: float
    """Time spent in the loop, that before a resume included."""


def train(
    run: RunConfig,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    measure: Callable[[SelfAblatingTransformer], Mapping[str, float]] | None = None,
) -> TrainResult:
    """Trains a model and writes a run folder.

    Under `accelerate launch` every process calls this; `train.batch_size` is shared among them and one of them writes.

    Args:
        run: the configuration.
        out: the run folder; new, unless the run in it is to be resumed.
        device: auto, cpu, cuda or mps.
        resume: continue from the last complete checkpoint in `out`, or from the beginning if there is none yet. The
            result is bit for bit that of an uninterrupted run on the same machine, versions, threads and processes.
        progress: show progress on standard error.
        measure: further figures of the model, such as its skill in a task. It is called at every evaluation, and what
            it returns becomes a record of kind `measured` in `metrics.jsonl`. It must draw no random numbers from
            torch's generators.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit each other, the data, or the run to be resumed.
        FileExistsError: `out` holds a run and `resume` is False.
        OSError: `out` cannot be written.
        TrainingDiverged: a loss, gradient or weight is not finite; the last good checkpoint stays.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
        LostProcess: one of several processes died.
        RuntimeError: fewer processes train than the launcher was asked for.
    """
    out = output_folder(out)
    check_device(device)
    check_tracker(run.train.tracker)
    with ExitStack() as stack:
        accelerator = stack.enter_context(open_accelerator(run, out, device))
        check_processes(accelerator.num_processes)
        micro_batches(run, accelerator.num_processes)
        if accelerator.is_main_process:
            run_folder.check_free(out, resume)
            stack.enter_context(run_folder.sole_trainer(out))
        accelerator.wait_for_everyone()
        try:
            shown = progress and accelerator.is_main_process
            return _train(run, out, accelerator, resume=resume, progress=shown, measure=measure)
        except TrainingDiverged as error:
            steps = complete_steps(out)
            kept = f"The last good checkpoint, {steps[-1]}, is kept" if steps else "There is no checkpoint yet"
            raise TrainingDiverged(f"training stopped: {error}. {kept}. Try a lower train.lr or train.clip") from None
        except RuntimeError as error:
            if accelerator.num_processes > 1 and is_lost_connection(error):
                raise LostProcess(out, accelerator.process_index) from error
            raise


def _train(
    run: RunConfig,
    out: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
    progress: bool,
    measure: Callable[[SelfAblatingTransformer], Mapping[str, float]] | None,
) -> TrainResult:
    cfg, main = run.train, accelerator.is_main_process
    early = known_without_weights(run)
    if progress and not resume and early:
        for text in filter(None, (run.data.source, run.data.validation)):
            path_of(text)
        print(plan(run), file=sys.stderr)
    setup = set_up(run, out, accelerator, resume=resume, progress=progress)
    state, model, module, optimizer = setup.state, setup.model, setup.module, setup.optimizer
    if progress and not resume and not early:
        print(plan(run, model), file=sys.stderr)
    metrics = MetricsFile(out / run_folder.METRICS)
    validation = validation_blocks(setup.data.validation, run.model.n_ctx, cfg.eval_tokens)
    batches = _batches(run, setup, accelerator)
    parts = micro_batches(run, accelerator.num_processes)
    recorded = None
    if records_steps(cfg, module, accelerator.device, accelerator.num_processes, parts):
        recorded = RecordedStep(module)
    step = state.step
    window = Window(term_names(run, trains_ablated(step, run)), lambda x: accelerator.reduce(x, "mean"))
    window.fetched = list(state.window)
    tokens_per_step = cfg.batch_size * run.model.n_ctx
    began = time.perf_counter() - state.seconds
    logged_step, logged_at = step, time.perf_counter()

    def record(kind: str, values: dict[str, Any]) -> None:
        if main:
            with run_folder.explain_write_errors(out):
                metrics.append({"kind": kind, "step": step, **values})
            accelerator.log({f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    on_cpu = accelerator.device.type == "cpu"
    with kept_freed_memory(kept=on_cpu), stop_requests() as stop, _bar(cfg.steps, step, out, progress) as bar:
        while True:
            last, paused_at = step == cfg.steps, time.perf_counter()
            stopping = _processes_stop(stop, step, cfg.log_every, accelerator)

            # -------------------------------------------------------------------------------------------- evaluate
            if step > state.step and (last or step % cfg.eval_every == 0):
                window.fetch(step)
                with setup.exact_weights():
                    evaluation = evaluate(
                        model,
                        validation,
                        bytes_per_token=bytes_per_token(setup.data.validation),
                        clean_alone=not trains_ablated(step - 1, run),
                        share=(accelerator.process_index, accelerator.num_processes),
                        total=lambda x: _total(x, accelerator),
                    )
                    further = dict(measure(model)) if measure is not None and main else None
                _check_evaluation(evaluation, step)
                figures = dataclasses.asdict(evaluation)
                state = dataclasses.replace(state, evaluation=figures)
                record("eval", figures)
                if further is not None:
                    record("measured", further)
                if is_best(evaluation, step, run, state.best_loss):
                    state = dataclasses.replace(state, best_loss=selection_loss(evaluation), best_step=step)
                    extra = {"run": to_dict(run), "text": setup.text, "step": step, "validation": figures}
                    with setup.exact_weights(), run_folder.explain_write_errors(out):
                        if main:
                            save_and_load.save(model, out, extra)
                if progress:
                    bar.write(_evaluation_line(step, evaluation, best=state.best_step == step), file=sys.stderr)

            # ------------------------------------------------------------------------------------------------ save
            if step > state.step and (last or stopping or step % cfg.save_every == 0):
                window.fetch(step)
                state = dataclasses.replace(
                    state,
                    step=step,
                    position=step * cfg.batch_size,
                    lr=learning_rate(step, cfg),
                    seconds=time.perf_counter() - began,
                    window=window.fetched,
                )
                with setup.exact_base():
                    _save(out, state, setup, accelerator)

            # ------------------------------------------------------------------------------------------- stop test
            if stopping and not last:
                message = (
                    f"stopped after step {step}; everything is saved. Go on with: sa-lens train --out {out} --resume"
                )
                raise Interrupted(message, folder=out, step=step)
            if last:
                break

            # ----------------------------------------------------------------------------------------- *** step ***
            logged_at += time.perf_counter() - paused_at
            lr, ablated = learning_rate(step, cfg), trains_ablated(step, run)
            window.names = term_names(run, ablated)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows: list[Tensor] = []
            if recorded is not None:
                tokens, targets = next(batches)
                rows.append(recorded(tokens, targets, clean_alone=not ablated))
            for part in range(1, parts + 1) if recorded is None else ():
                tokens, targets = next(batches)
                with nullcontext() if part == parts else accelerator.no_sync(module):
                    terms = module(tokens, targets, clean_alone=not ablated)
                    accelerator.backward(terms.total / parts)
                rows.append(term_row(terms))
            norm = accelerator.clip_grad_norm_(module.parameters(), cfg.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            window.add(torch.cat([torch.stack(rows).mean(0), whole_tensor(norm.detach()).float().reshape(1)]))
            step += 1
            bar.update()

            # ------------------------------------------------------------------------------------------------- log
            if step % cfg.log_every == 0 or step in (cfg.steps, cfg.dense_steps):
                window.fetch(step)
                means, now = window.means(), time.perf_counter()
                speed = (step - logged_step) * tokens_per_step / (now - logged_at)
                logged_step, logged_at = step, now
                streams = {"streams": 2 if ablated else 1} if run.gates.gated else {}
                figures = {"tokens": step * tokens_per_step, **means, "lr": lr, "tokens_per_s": round(speed), **streams}
                record("train", {**figures, "seconds": round(now - began, 1)})
                bar.set_postfix_str(_status(means, speed))

    assert state.best_loss is not None
    assert state.best_step is not None
    assert state.evaluation is not None
    with setup.exact_weights():
        drawn = _final_sample(run, model, metrics, record) if main else None
        accelerator.wait_for_everyone()
    if setup.narrow_base is not None:
        setup.narrow_base.restore()
    evaluation, seconds = Evaluation(**state.evaluation), time.perf_counter() - began
    return TrainResult(out, model, step, state.best_loss, state.best_step, evaluation, drawn, seconds)


def _batches(run: RunConfig, setup: TrainingSetup, accelerator: Accelerator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this process's micro-batches from the current step on, on its device."""
    device, processes = accelerator.device, accelerator.num_processes
    positions = ProcessPositions(
        *(setup.state.step, run.train.steps, run.train.batch_size, micro_batches(run, processes)),
        rank=accelerator.process_index,
        world_size=processes,
    )
    options: dict[str, Any] = {"workers": run.train.workers, "pin_memory": device.type == "cuda"}
    loader = training_loader(setup.data.train, run.model.n_ctx, positions, seed=run.train.seed, **options)
    for tokens, targets in loader:
        yield tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _processes_stop(stop: StopRequest, step: int, every: int, accelerator: Accelerator) -> bool:
    """Returns whether to stop now; several processes decide together, every `every` steps."""
    if accelerator.num_processes == 1:
        return stop.made
    if step % every != 0:
        return False
    return bool(accelerator.reduce(torch.tensor(float(stop.made), device=accelerator.device), "sum") > 0)


def _total(x: Tensor, accelerator: Accelerator) -> Tensor:
    """Returns the sum over all processes, on the device of `x`."""
    if accelerator.num_processes == 1:
        return x
    return accelerator.reduce(x.to(accelerator.device), "sum").to(x.device)


def _check_evaluation(evaluation: Evaluation, step: int) -> None:
    for name in ("clean_loss", "ablated_loss"):
        value = getattr(evaluation, name)
        if value is not None and not math.isfinite(value):
            raise TrainingDiverged(f"after step {step} the validation {name} = {value}")


def _save(out: Path, state: checkpoints.RunState, setup: TrainingSetup, accelerator: Accelerator) -> None:
    """Writes a checkpoint after a check that everything in it is finite; one process writes."""
    from accelerate.utils import gather_object

    weights = {name: whole_tensor(p.detach()).cpu().contiguous() for name, p in setup.model.named_parameters()}
    moments = checkpoints.optimizer_tensors(setup.model, setup.optimizer.optimizer)
    for name, tensor in [*weights.items(), *moments.items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingDiverged(f"after step {state.step} {name} is not finite")
    generators = gather_object([checkpoints.generators_of(accelerator.process_index)])
    if accelerator.is_main_process:
        tensors = checkpoints.Tensors(
            weights=weights,
            optimizer=moments,
            generators={name: tensor for of_process in generators for name, tensor in of_process.items()},
        )
        with run_folder.explain_write_errors(out):
            checkpoints.write(out, state, tensors)
    accelerator.wait_for_everyone()


def _final_sample(run: RunConfig, model: SelfAblatingTransformer, metrics: MetricsFile, record: Any) -> Sample | None:
    """Draws text from both streams and records it once, even if a finished run is resumed several times."""
    if run.train.sample_tokens == 0 or model.tokenizer is None:
        return None
    drawn = sample(model, max_new_tokens=run.train.sample_tokens, seed=run.train.seed)
    if not any(r["kind"] == "sample" for r in metrics.read()):
        record("sample", dataclasses.asdict(drawn))
    return drawn


def _bar(steps: int, step: int, out: Path, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=steps,
        initial=step,
        desc=out.name,
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
        # a log file gets a line every 15 s
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )


def _status(means: dict[str, float], speed: float) -> str:
    """Returns losses and speed for the progress bar."""
    shown = {name: means[name] for name in ("clean", "ablated") if name in means}
    return ", ".join([*(f"{name} {value:.3f}" for name, value in shown.items()), f"{speed:,.0f} tokens/s"])


def _evaluation_line(step: int, evaluation: Evaluation, *, best: bool) -> str:
    parts = [f"clean {evaluation.clean_loss:.4f} (perplexity {evaluation.clean_perplexity:.2f})"]
    if evaluation.ablated_loss is not None:
        parts.append(f"ablated {evaluation.ablated_loss:.4f} (perplexity {evaluation.ablated_perplexity:.2f})")
        parts.append(f"units used {evaluation.units_used:.0%}")
        if evaluation.mask_overlap is not None:
            parts.append(f"mask overlap {evaluation.mask_overlap:.0%}")
    return f"step {step:>7,}  validation: {', '.join(parts)}{'  (best)' if best else ''}"
