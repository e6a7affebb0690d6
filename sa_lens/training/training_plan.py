"""What a training run is about to do: the model, its gates, types and memory, known before anything is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sa_lens.catalogue import run_folder as folder_of
from sa_lens.catalogue import shipped_folder
from sa_lens.config import RunConfig
from sa_lens.core import SelfAblatingTransformer, architecture, save_and_load
from sa_lens.core.fused import why_not_fused
from sa_lens.core.hugging_face import is_hugging_face, read_files
from sa_lens.core.initial_model import initial_model
from sa_lens.data.cache import cache_folder
from sa_lens.data.tokenizers import fetch_tokenizer, load_tokenizer
from sa_lens.data.tokens import vocabulary_of

_PROGRAM = 0.5e9
"""Bytes of Python and its libraries."""
_FUSED = {"fp32": 26, "bf16": 15}
"""Bytes of both streams per token, layer and number (residual stream, attention units, neurons), measured on CPUs."""
_FUSED_LOGITS = 1 << 26
"""Logits that exist at once."""
_HOOKED, _HOOKED_PATTERN, _HOOKED_LOGIT = 100, 46, 14
"""The same by hooks, and bytes per entry of the attention patterns and per logit."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run is about to do, from `plan`."""

    source: str
    """Where the weights come from."""
    base_parameters: int
    """Numbers in the transformer; those of a vocabulary that is still to be made are counted at its largest."""
    gate_parameters: int
    """Numbers in the gates."""
    trained_parameters: int
    """Numbers that are trained."""
    n_ctx: int
    """Length of the training sequences, in tokens."""
    longest: int | None
    """Longest sequence that the model takes; None where nothing limits it."""
    path: Literal["fused", "hooked"]
    """Path of the loss."""
    why_hooked: str | None
    """What the fused path does not cover of this model; None: nothing."""
    bytes: float
    """Estimate of the memory that training takes on one process, including Python and the loading of weights."""
    run: RunConfig
    """The settings."""

    def __str__(self) -> str:
        run, gates = self.run, self.run.gates
        base = "frozen" if run.train.freeze == "base" else "trained"
        learned = "trained" if gates.learned else "random, not trained"
        products = "bfloat16" if run.train.precision == "bf16" else "float32"
        longest = "" if self.longest is None or self.longest == self.n_ctx else f", of up to {self.longest:,}"
        lines = {"model": f"{self.source}, {_count(self.base_parameters)} parameters, {base}"}
        if gates.gated:
            units = f"k_attn {gates.k_attn}, k_mlp {gates.k_mlp}"
            units += "" if gates.rank is None else f", rank {gates.rank}"
            fit = f", fitted to {run.train.fit_tokens:,} tokens first" if run.train.fit_tokens else ""
            lines["gates"] = f"{gates.scope}, {units}, {_count(self.gate_parameters)} parameters, {learned}{fit}"
        lines["context"] = f"{self.n_ctx} tokens (model.n_ctx){longest}; {run.train.batch_size} sequences per step"
        weights = "weights float32"
        if holds_narrow_base(run) and self.path == "fused":
            weights = "base held in bfloat16 (evaluated and saved in float32), gates float32"
        lines["types"] = f"{weights}, matrix products {products}"
        why = f", because the fused one does not cover {self.why_hooked}" if self.why_hooked is not None else ""
        lines["memory"] = f"about {self.bytes / 1e9:.1f} GB on the {self.path} path{why}"
        return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def plan(run: RunConfig, model: SelfAblatingTransformer | None = None) -> TrainingPlan:
    """What a training run with these settings is about to do, without reading text or training anything.

    Weights are not read either, unless `train.init` is a Hub id or the name of a TransformerLens model.

    Args:
        model: the model before its first step, if it is there already.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit each other or the model of `train.init`.
    """
    init, gates = run.train.init, run.gates
    longest: int | None = run.model.n_ctx
    loading = 0.0
    if model is None and init is not None and shipped_folder(init) is None and is_hugging_face(init):
        files = read_files(init)
        files.context(run.model.n_ctx)
        architecture.check_units(gates, files.d_model, files.n_heads, files.d_head, files.d_mlp)
        shape: Any = files
        source, base, longest = f"{files.architecture} from {init} ({files.stored})", files.parameters, files.n_ctx
        loading, why_hooked = 10.0 * base, files.why_not_fused
    else:
        model = _without_weights(run) if model is None else model
        shape = model.cfg
        source = "random weights" if init is None else f"weights of {init}"
        base = sum(parameter.numel() for parameter in model.base_parameters())
        longest, why_hooked = model.cfg.n_ctx, why_not_fused(model)
    path: Literal["fused", "hooked"] = "hooked" if run.train.path == "hooked" or why_hooked is not None else "fused"
    n_attn, d_mlp = shape.n_heads * shape.d_head, shape.d_mlp or 0
    units = n_attn if gates.attn_unit == "channel" else shape.n_heads
    in_gates = shape.n_layers * sum(gates.count_parameters(shape.d_model, n) for n in (units, d_mlp) if n)
    trained = (in_gates if gates.learned else 0) + (base if run.train.freeze == "none" else 0)
    tokens = run.train.batch_size // run.train.accumulate * run.model.n_ctx
    numbers = tokens * shape.n_layers * (shape.d_model + n_attn + d_mlp)
    width = {"fp32": 4, "bf16": 2}[run.train.precision]
    # the unembedding in the precision of the products, and a chunk of logits
    logits = width * (shape.d_model * shape.d_vocab + min(tokens * shape.d_vocab, _FUSED_LOGITS))
    activations = float(_FUSED[run.train.precision] * numbers + logits)
    if path == "hooked":
        patterns = tokens * shape.n_layers * shape.n_heads * run.model.n_ctx
        activations = _HOOKED * numbers + _HOOKED_PATTERN * patterns + _HOOKED_LOGIT * tokens * shape.d_vocab
    elif run.train.checkpoint_activations:
        activations *= 0.6
    narrow = path == "fused" and holds_narrow_base(run)
    weights = (2.0 if narrow else 4.0) * base + 4 * in_gates
    # AdamW's two moments, and gradients, which the backward pass makes while it frees the activations
    training = weights + 8 * trained + max(activations, 4 * trained + activations / 2)
    # the exact weights of a frozen base are read from a file
    saving = 4 * (base + in_gates) + (2.0 * base if narrow else 0.0) + 8 * trained
    # moments of what the gates read and of the units, in float64
    moments = 8.0 * shape.n_layers * (shape.d_model + 1) * (shape.d_model + 1 + n_attn + d_mlp)
    fitting = 4 * (base + in_gates) + moments if run.train.fit_tokens else 0.0
    memory = _PROGRAM + max(training, loading, saving, fitting)
    return TrainingPlan(source, base, in_gates, trained, run.model.n_ctx, longest, path, why_hooked, memory, run)


def _without_weights(run: RunConfig) -> SelfAblatingTransformer:
    """A model of the run's shape, with weights only where its shape is not known without them."""
    init = run.train.init
    if init is not None and folder_of(init).is_dir():
        described = {**save_and_load.read_config(folder_of(init)), "gates": dataclasses.asdict(run.gates)}
        return save_and_load.build(SelfAblatingTransformer, described, device="meta")
    if init is not None:
        return initial_model(init, run.gates, n_ctx=run.model.n_ctx)
    d_vocab = run.model.d_vocab
    if d_vocab is None and run.data.tokenizer == "bpe":
        d_vocab = run.data.vocab_size
    elif d_vocab is None:
        d_vocab = vocabulary_of(load_tokenizer(fetch_tokenizer(run.data.tokenizer, cache_folder(run.data.cache_dir))))
    cfg = architecture.hooked_config(dataclasses.replace(run.model, d_vocab=d_vocab))
    cfg.init_weights = False
    return SelfAblatingTransformer(cfg, run.gates, device="meta")


def holds_narrow_base(run: RunConfig) -> bool:
    """Whether the run holds its frozen base in bfloat16, where the fused path can run the model."""
    cfg = run.train
    return (cfg.freeze, cfg.precision) == ("base", "bf16") and cfg.path != "hooked"


def known_without_weights(run: RunConfig) -> bool:
    """Whether `plan` needs no weights."""
    return run.train.init is None or folder_of(run.train.init).exists()


def _count(numbers: int) -> str:
    return f"{numbers / 1e6:.1f} M" if numbers >= 1e5 else f"{numbers:,}"
