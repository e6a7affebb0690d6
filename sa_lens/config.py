"""Configuration: frozen dataclasses for model, gates, loss, data and training, with YAML in and out.

The same dataclasses feed the Python API, the YAML files and the command-line flags. Nothing here imports torch, reads a
file at construction, or chooses a device (the device is an argument of the functions that need one).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

# Choices: every option that takes one of a few names, once for API, files and command line

Scope = Literal["none", "local", "global", "both"]
"""What the gates read: nothing (no gates), each layer's own input, the end of a clean pass, or both."""
Stream = Literal["clean", "ablated"]
"""The plain transformer, or what the top-k gates leave of it."""
Masks = Literal["frozen", "live"]
"""Masks of the ablated stream: kept from the unedited clean prompt, or computed anew under every edit."""
Site = Literal["attn", "mlp"]
"""Which units of a layer: `attn`, attention units; `mlp`, neurons."""
Activation = Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "silu", "solu", "solu_ln"]
"""Activation function of the MLP, by TransformerLens's name."""
Surrogate = Literal["sigmoid", "softmax"]
"""Soft weights that give the mask its gradient. `sigmoid`: the reference's code; `softmax`: the paper's text."""
LossPath = Literal["auto", "fused", "hooked"]
"""Path of the training loss: fused kernels, or the readable hooked one; `auto`: fused where it can."""
Freeze = Literal["none", "base"]
"""What is not trained: `none`: everything is; `base`: all but the gates stays as it is."""
Which = Literal["best", "last"]
"""Weights of a run: the best by validation loss, or those of the last checkpoint."""
Device = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; `auto` takes a GPU if there is one."""
Task = Literal["ioi", "pronoun", "object", "repeated"]
"""Indirect object, gender of a pronoun, object recall, repeated name."""
Patterns = Literal["seen", "held-out"]
"""Sentence patterns of prompts: those of the generated stories, or with at least one sentence that no story has."""
NamePairs = Literal["any", "held-out", "seen"]
"""Pairs of names in prompts: any, those that never occur together in a generated story, or those that may."""
Words = Literal["stories", "tinystories"]
"""Vocabulary of the prompts: that of the generated stories, or that of TinyStories."""
Method = Literal["acdc", "eap", "eap-ig", "relp", "exact", "gate"]
"""How to find a circuit. `acdc` decides edge by edge. The others rank all edges: `eap`, `eap-ig` and `relp` by
gradients, `exact` by the effect of removing each edge alone, `gate` by the model's own masks."""
ReportMethod = Literal["acdc", "eap-ig", "gate"]
"""A method whose circuits a report shows; only the ablated stream has a circuit of the gates."""
Ablation = Literal["resample", "zero", "mean"]
"""What an edge outside the circuit carries: its source's activation on the corrupt prompt; zero; or the mean of the
activations on the corrupt prompts of the same length, position by position."""
PatchKind = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "heads",
    "q",
    "k",
    "v",
    "pattern",
    "neurons",
    "mask_attn",
    "mask_mlp",
    "mask_heads",
    "mask_attn_units",
    "mask_mlp_units",
]
"""What can be patched: the residual stream before, in and after a layer; outputs of attention and MLP; of single heads
the output (`z`), queries, keys, values or attention pattern; neurons; and masks of the gates."""
NodeKind = Literal["heads", "mlps", "attn_units", "neurons"]
"""What can be attributed: heads, outputs of MLPs, attention units, neurons."""
Direction = Literal["denoise", "noise"]
"""`denoise`: values of the clean prompt put into the run of the corrupt one. `noise`: the other way round."""
MetricName = Literal[
    "logit_difference", "pair_accuracy", "top1_accuracy", "answer_rank", "answer_log_probability", "kl"
]
"""What is measured at the end of a prompt; `kl` compares with the unedited clean prompt."""
PresetName = Literal["paper-2024-10", "paper-head", "laptop"]
"""A named training recipe; see `PRESETS`."""
SAEPreset = Literal["laptop", "paper"]
"""Named settings of a sparse autoencoder."""
GridName = Literal["laptop", "laptop-tinystories", "paper", "smoke"]
"""A named comparison of models."""
ExportFormat = Literal["hooked", "reference", "hf"]
"""A plain HookedTransformer, a state dict with the names of the paper's code, or a GPT-2 folder for transformers."""

LARGEST_SEED = 2**32 - 1
"""Largest seed that every random generator in use takes."""

_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("model.n_layers", "model.d_model", "model.n_heads", "model.d_head", "model.n_ctx"), 1),
    **dict.fromkeys(
        ("gates.k_attn", "gates.k_mlp", "gates.rank", "train.steps", "train.batch_size", "train.accumulate"), 1
    ),
    **dict.fromkeys(("train.eval_every", "train.eval_tokens", "train.save_every", "train.log_every"), 1),
    **{"model.d_vocab": 2, "data.max_documents": 2, "data.n_stories": 100, "data.vocab_size": 300},
    "train.dense_share": -math.inf,  # its range depends on the steps
}
"""Smallest value of a number; that of any other is 0."""
_ABOVE_ZERO = ("model.eps", "gates.temperature", "train.lr", "train.dense_lr", "train.adam_eps")
_AT_MOST: dict[str, float] = {
    "model.n_layers": 1_000,
    **dict.fromkeys(("model.d_model", "model.d_head"), 100_000),
    "model.n_heads": 10_000,
    "model.d_mlp": 1_000_000,
    **dict.fromkeys(("model.n_ctx", "model.d_vocab", "data.vocab_size"), 10_000_000),
    "model.eps": 1.0,
    **dict.fromkeys(("gates.temperature", "loss.clean", "loss.ablated", "loss.reconstruction"), 1e6),
    "data.n_stories": 100_000_000,
    **dict.fromkeys(("data.stories_seed", "train.seed"), LARGEST_SEED),
    "train.workers": 1_000,
}
"""Largest value of a number; that of any other whole number is 10**12, that of any other number infinite."""

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

_C = TypeVar("_C")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: object, annotation: Any) -> None:
    """Checks that the value of an argument is one that its `Literal` allows.

    Raises:
        ValueError: it is not.
    """
    choices = typing.get_args(annotation)
    _check(value in choices, f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}")


_HOOK_KINDS = {
    **{"z": "heads", "post": "neurons", "mlp_post": "neurons", "mlp_out": "mlps"},
    **{"query": "q", "key": "k", "value": "v", "attn": "pattern"},
    **{"attn_gate.mask": "mask_attn", "mlp_gate.mask": "mask_mlp"},
}
"""Other names of kinds: those of TransformerLens's `ActivationCache`, `utils.get_act_name` and hook points."""


def kind_of(what: str, kinds: Any) -> tuple[str, int | None]:
    """The kind of activation that a name means, and the layer if the name has one.

    Args:
        what: a kind, or TransformerLens's name of it: `z`, `hook_z`, `attn.hook_z` or `blocks.0.attn.hook_z`.
        kinds: the `Literal` of the kinds, `PatchKind` or `NodeKind`.

    Raises:
        ValueError: no such kind, with the nearest one.
    """
    known = typing.get_args(kinds)
    name = re.fullmatch(r"(?:blocks\.(?P<layer>\d+)\.)?(?P<rest>.*)", str(what), re.DOTALL)
    assert name is not None, "it matches every text"
    short = name["rest"].replace("hook_", "")
    for candidate in (short, short.removeprefix("attn.").removeprefix("mlp.")):
        for kind in (candidate, _HOOK_KINDS.get(candidate, candidate)):
            if kind in known:
                return kind, None if name["layer"] is None else int(name["layer"])
    names = {**{kind: kind for kind in known}, **{other: kind for other, kind in _HOOK_KINDS.items() if kind in known}}
    near = difflib.get_close_matches(short, names, n=1, cutoff=0.55)
    meant = f"; perhaps you meant {names[near[0]]}" if near else ""
    raise ValueError(f"what={shown(what)} is none of {', '.join(known)}{meant}")


def check_whole(name: str, value: object, least: int, meaning: str = "") -> None:
    """Checks that an argument is a whole number of at least `least`.

    Args:
        meaning: what the number counts, for the message.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    ending = f": {meaning}" if meaning else ""
    _check(whole, f"{name}={shown(value)} must be a whole number of at least {least}{ending}")


def _check_fields(config: Any, prefix: str) -> None:
    """Gives every field its declared type, and refuses numbers out of range and empty text.

    Raises:
        ValueError: naming the key.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        path = f"{prefix}{name}"
        value = convert(path, getattr(config, name), hint)
        object.__setattr__(config, name, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _AT_LEAST.get(path, 0), _AT_MOST.get(path, 10**12 if isinstance(value, int) else math.inf)
            _check(value > 0 or path not in _ABOVE_ZERO, f"{path}={shown(value)} must be above 0")
            _check(value >= least, f"{path}={shown(value)} must be " + (f"at least {least}" if least else "0 or more"))
            _check(value <= most, f"{path}={shown(value)} must be at most {most:,.15g}".replace(",", "_"))
        if isinstance(value, str):
            _check(bool(value.strip()), f"{path}={value!r} is empty: name something, or leave the setting out")
            _check("\0" not in value, f"{path}={shown(value)} holds a NUL character")


def shown(value: object) -> str:
    """A value as an error quotes it: short, however long or deeply nested the value is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 2, 4, 4, 4
    short.maxstring, short.maxother, short.maxlong = 60, 60, 40
    try:
        return short.repr(value)
    except ValueError:
        # Python refuses to write out whole numbers of thousands of digits
        return "(a number of thousands of digits)"


def suggestion(name: object, known: Iterable[str]) -> str:
    """`; perhaps you meant NAME` with the known name that is nearest to a misspelt one; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; perhaps you meant {near[0]}" if near else ""


def from_dict(cls: type[_C], values: dict[str, Any], *, base: _C | None = None, where: str = "") -> _C:
    """Builds the dataclass `cls` from nested dictionaries, starting from `base` (default: the defaults).

    Args:
        where: path of the values, with a dot at its end, for errors.

    Raises:
        ValueError: an unknown key (with the known ones), a missing one, a value of the wrong type, or one out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or cls.__name__} must be a mapping, not {shown(values)}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in known:
            near = suggestion(name, known)
            raise ValueError(f"unknown key {where}{shown(name)}; known keys: {', '.join(known)}{near}")
    changes: dict[str, Any] = {}
    for name, value in values.items():
        start = getattr(base, name) if base is not None else None
        changes[name] = convert(f"{where}{name}", value, hints[name], base=start)
    if base is not None:
        return dataclasses.replace(base, **changes)  # type: ignore[type-var]
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    for name, f in known.items():
        if name not in changes and (f.default, f.default_factory) == missing:
            raise ValueError(f"{where or cls.__name__} lacks the key {name!r}")
    return cls(**changes)


def convert(path: str, value: Any, hint: Any, *, base: Any = None) -> Any:
    """The value in the type that a field declares: a dataclass from a dictionary, a tuple from a list, a float from a
    whole number.

    Args:
        path: name of the value, for errors.
        base: a dataclass to start from.

    Raises:
        ValueError: a value of another type, or a number that is not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, base=base, where=f"{path}.")
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        return convert(path, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        check_choice(path, value, hint)
        return value
    if origin in (tuple, list):
        many = origin is list or args[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (many or len(value) == len(args)):
            what = "a list" if many else f"a list of {len(args)} numbers"
            raise ValueError(f"{path}={shown(value)} must be {what}")
        return origin(convert(path, item, args[0] if many else args[i]) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}={shown(value)} must be a mapping")
        return {convert(path, key, args[0]): convert(f"{path}.{key}", item, args[1]) for key, item in value.items()}
    kind = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path}={shown(value)} must be {_TYPE_NAMES[hint]}")
    try:
        value = hint(value)
        finite = hint is not float or math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{path}={shown(value)} must be a finite number")
    return value


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer trained from scratch; `core` turns it into a `HookedTransformerConfig`.

    The defaults are the model of the paper (arXiv 2505.00509): a GPT-Neo-like decoder without attention scale.
    """

    n_layers: int = 8
    """Number of layers."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 16
    """Attention heads per layer."""
    d_head: int | None = None
    """Width of a head; None: d_model / n_heads."""
    d_mlp: int | None = None
    """Neurons per layer; None: 4 * d_model. 0: attention only."""
    n_ctx: int = 256
    """Longest sequence, in tokens."""
    d_vocab: int | None = None
    """Vocabulary size; None: taken from the tokenizer."""
    act_fn: Activation = "gelu_new"
    """Activation of the MLP, by TransformerLens's name."""
    eps: float = 1e-5
    """Epsilon of LayerNorm."""
    attn_scale: bool = False
    """Divide attention scores by sqrt(d_head). The reference does not."""
    tied_embedding: bool = True
    """One matrix for embedding and unembedding."""
    qkv_bias: bool = False
    """Train biases of query, key and value; otherwise they stay zero."""
    unembed_bias: bool = False
    """Train a bias on the logits; otherwise it stays zero."""
    init: Literal["reference", "gpt2"] = "reference"
    """`reference`: uniform +-1/sqrt(fan_in), positions N(0, 1). `gpt2`: TransformerLens's N(0, 0.8/sqrt(d_model))."""

    def __post_init__(self) -> None:
        _check_fields(self, "model.")
        _check(
            self.d_head is not None or self.d_model % self.n_heads == 0,
            f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}; set model.d_head",
        )


@dataclass(frozen=True)
class GateConfig:
    """The gates of a self-ablating transformer (paper, section 3)."""

    scope: Scope = "local"
    """What the gates read. `local`: each layer's own input, in the clean stream unless `scores` says otherwise.
    `global`: the end of a clean pass. `both`: the two scores add. `none`: no gates, a plain transformer (the
    baseline)."""
    k_attn: int = 8
    """Attention units that stay, per token and layer (whole heads if attn_unit is `head`)."""
    k_mlp: int = 8
    """Neurons that stay, per token and layer."""
    kind: Literal["hard", "soft"] = "hard"
    """`hard`: the forward value is the 0/1 mask, its gradient the surrogate's. `soft`: the surrogate weights act in the
    forward pass too."""
    surrogate: Surrogate = "sigmoid"
    """Soft weights that give the gradient. `sigmoid`: the reference's code. `softmax`: the paper's text."""
    temperature: float = 1.0
    """Temperature T of the surrogate: its width is T times the gap between the k-th and the next score."""
    attn_unit: Literal["channel", "head"] = "channel"
    """Unit of attention gates: one of n_heads * d_head channels of z (the paper's), or a whole head."""
    scores: Literal["learned", "ablated", "random-token", "random-static"] = "learned"
    """Where scores come from. `learned`: trained gates that read the clean stream. `ablated`: trained local gates that
    read the ablated stream, so that a mask depends on nothing that this stream does not know. Controls, whose gates
    stay as drawn while the base is trained through the same loss: `random-token`, a random linear map of what the gate
    reads; `random-static`, one random score for each unit of a layer, the same for every token."""

    rank: int | None = None
    """Rank of the gates' matrices, which are then products of two narrow ones: fewer numbers on wide models. None: full
    matrices."""

    def __post_init__(self) -> None:
        _check_fields(self, "gates.")
        _check(
            self.rank is None or self.learned,
            f"gates.rank={self.rank} does not fit gates.scores={self.scores!r}, whose gates are not trained: leave "
            "gates.rank out, or set gates.scores='learned'",
        )
        _check(
            self.scores != "ablated" or not self.reads_global,
            f"gates.scores='ablated' does not fit gates.scope={self.scope!r}, whose gates would need the end of a pass "
            "to choose the masks of that pass: set gates.scope='local', or gates.scores='learned' for gates that read "
            "the clean stream",
        )

    @property
    def gated(self) -> bool:
        """Whether there are gates at all."""
        return self.scope != "none"

    @property
    def reads_local(self) -> bool:
        """Whether scores depend on each layer's own input."""
        return self.scope in ("local", "both")

    @property
    def reads_ablated(self) -> bool:
        """Whether that input is the ablated stream's, not the clean one's."""
        return self.gated and self.scores == "ablated"

    @property
    def reads_global(self) -> bool:
        """Whether scores depend on the end of a clean pass."""
        return self.scope in ("global", "both")

    @property
    def learned(self) -> bool:
        """Whether the gates are trained; the controls keep theirs as drawn."""
        return self.scores in ("learned", "ablated")

    def count_parameters(self, d_model: int, n_units: int) -> int:
        """Returns how many numbers the gate of one sublayer has."""
        matrix = d_model * n_units if self.rank is None else (d_model + n_units) * self.rank
        return (self.reads_local + self.reads_global) * (matrix + n_units)


@dataclass(frozen=True)
class LossConfig:
    """Coefficients of the two-stream loss `clean * CE(clean) + ablated * CE(ablated) + reconstruction * R`.

    With `gates.scope="none"` the loss is CE(clean) with coefficient 1 whatever stands here.
    """

    clean: float = 1.0
    """Coefficient of the clean stream's cross-entropy."""
    ablated: float = 1.0
    """Coefficient of the ablated stream's cross-entropy."""
    reconstruction: float = 0.0
    """Coefficient of R, the distance between the normalised residual streams."""

    def __post_init__(self) -> None:
        _check_fields(self, "loss.")
        _check(self.clean + self.ablated + self.reconstruction > 0, "loss: at least one coefficient must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and packing."""

    source: str = "stories"
    """`stories` (generated, see sa_lens.data.stories), a local parquet / jsonl / txt / arrow file or folder, or a
    dataset id on the Hub, with `@` and a revision if need be."""
    validation: str | None = None
    """File or dataset id of the validation text; None: a split of the source."""
    column: str = "text"
    """Column that holds the text."""
    split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; None: `validation_fraction` of the training documents, chosen by seed."""
    validation_fraction: float = 0.02
    """Share of documents held out when no validation text is named."""
    streaming: bool = False
    """Read a Hub dataset without downloading it whole."""
    max_documents: int | None = None
    """Use at most so many documents; None: all. Required when streaming."""
    n_stories: int = 20_000
    """Number of stories when source is `stories`."""
    stories_seed: int = 0
    """Seed of the generated stories and of the validation split."""
    tokenizer: str = "bpe"
    """`bpe` (a byte-level BPE trained on the source; with `train.init`, that model's), a tokenizer folder, a GGUF file,
    or a Hub id."""
    vocab_size: int = 4096
    """Vocabulary of a trained BPE."""
    keep_whole: str | None = None
    """Text file (one word a line) or IOI JSON whose words stay single tokens, with their leading space. The names of
    the generated stories always do, and all their words from 1,000 tokens on."""
    cache_dir: str | None = None
    """Folder for tokens on disk; None: `$SA_LENS_CACHE`, else `~/.cache/sa_lens`."""

    def __post_init__(self) -> None:
        _check_fields(self, "data.")
        _check(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1",
        )
        _check(
            not self.streaming or self.max_documents is not None,
            "data.streaming needs data.max_documents: say how many documents to take",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, evaluation and checkpoints."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences of n_ctx tokens per optimizer step, over all processes."""
    accumulate: int = 1
    """Micro-batches a step is split into, over all processes: with 2, one process takes both in turn, or two processes
    take one each with the same result. Fewer than the processes: as many as there are processes."""
    lr: float = 1e-3
    """Peak learning rate; cosine to 0 at the last step. With `dense_share`, the rate at which both streams begin."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the cosine."""
    dense_share: float = 0.0
    """Share of the steps, the first ones, in which only the clean stream is trained, at a dense step's cost; after them
    both streams are. 0: both from the first step, as in the paper. The learning rate is constant in these steps; for a
    model without gates that is all. A frozen base has no such steps."""
    dense_lr: float | None = None
    """Learning rate of the dense steps; None: `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Weight decay of the matrices; never of biases, LayerNorm or gates."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of matrix products in training; trained parameters, optimizer and losses stay float32. With bf16 and
    the fused path a frozen base is held in bfloat16; it is evaluated and saved in float32."""
    path: LossPath = "auto"
    """Path of the training loss: fused kernels, or the readable hooked one; `auto`: fused where it can."""
    compile: bool = False
    """Compile the training loss with torch.compile."""
    cuda_graph: bool = True
    """On one GPU, with the fused path and one batch per step, record a step as a CUDA graph and replay it."""
    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    freeze: Freeze = "none"
    """`base`: train only the gates of a frozen model; `none`: train everything."""
    init: str | None = None
    """Start from this model instead of random weights: a run folder, a shipped model, a folder or GGUF file of a model
    of Hugging Face's `transformers`, a Hub id of a model that sa_lens saved, or a TransformerLens model name."""
    fit_tokens: int = 0
    """Tokens of the training text, the first ones, to which the local gates are fitted before the first step
    (`training.fit_gates`), so that they begin near the largest units of `init`; 0: gates begin as drawn."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    eval_tokens: int = 100_000
    """Validation tokens per evaluation, always the same ones."""
    sample_tokens: int = 60
    """Tokens of the text sampled from each stream at the end; 0: no sample."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved, the last two are kept."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    workers: int = 0
    """Data-loading processes."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Experiment tracker, through Accelerate; metrics.jsonl is always written."""
    seed: int = 0
    """Seed of initialisation and of the order of blocks."""

    def __post_init__(self) -> None:
        _check_fields(self, "train.")
        _check(
            self.warmup_steps < self.steps,
            f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}",
        )
        _check(
            0 <= self.dense_share <= 1 and self.dense_steps < self.steps,
            f"train.dense_share={self.dense_share} must be from 0 to below 1, and leave at least one of the "
            f"{self.steps} steps for the ablated stream",
        )
        _check(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.accumulate={self.accumulate}",
        )
        _check(
            all(0 <= beta < 1 for beta in self.betas), f"train.betas={self.betas} must be two numbers from 0 to below 1"
        )
        _check(
            self.freeze == "none" or self.init is not None,
            "train.freeze='base' trains gates on an existing model: name it in train.init",
        )
        _check(
            self.fit_tokens == 0 or self.init is not None,
            f"train.fit_tokens={self.fit_tokens} fits gates to an existing model: name it in train.init",
        )

    @property
    def dense_steps(self) -> int:
        """First steps in which only the clean stream is trained; 0 if the base is frozen."""
        return 0 if self.freeze == "base" else round(self.dense_share * self.steps)


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    gates: GateConfig = field(default_factory=GateConfig)
    """The gates."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Coefficients of the loss."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and tokenizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""

    def __post_init__(self) -> None:
        _check_fields(self, "")
        gates = self.gates
        _check(
            self.train.fit_tokens == 0 or (gates.scope == "local" and gates.learned),
            f"train.fit_tokens={self.train.fit_tokens} fits learned local gates alone, not those of "
            f"gates.scope={gates.scope!r} and gates.scores={gates.scores!r}: set train.fit_tokens=0",
        )


_PAPER = RunConfig(
    data=DataConfig(source="roneneldan/TinyStories", validation_split="validation", tokenizer="gpt2"),
    train=TrainConfig(eval_every=2_000, eval_tokens=500_000, save_every=2_000, log_every=50),
)

PRESETS: dict[PresetName, RunConfig] = {
    "paper-2024-10": dataclasses.replace(
        _PAPER,
        loss=LossConfig(clean=0.5, ablated=0.5),
        train=dataclasses.replace(_PAPER.train, steps=400_000, batch_size=24, lr=1.4e-3),
    ),
    "paper-head": dataclasses.replace(
        _PAPER,
        gates=GateConfig(temperature=0.1),
        loss=LossConfig(clean=0.1, ablated=0.9, reconstruction=0.1),
        train=dataclasses.replace(_PAPER.train, steps=200_000, batch_size=32, lr=1e-3),
    ),
    "laptop": RunConfig(
        model=ModelConfig(n_layers=4, d_model=128, n_heads=4, init="gpt2", attn_scale=True),
        gates=GateConfig(temperature=0.1),
        train=TrainConfig(
            steps=3_000,
            dense_share=0.65,
            batch_size=8,
            dense_lr=3e-3,
            lr=1.5e-3,
            warmup_steps=100,
            precision="bf16",
            eval_every=500,
            eval_tokens=50_000,
        ),
    ),
}
"""Named starting points. `paper-*` are the recipes of the paper's code; `laptop` trains in minutes on two CPU cores."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, lists, strings and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


class _Loader(yaml.SafeLoader):
    """YAML as `write_yaml` writes it: `1e-3` is a number, a key may stand only once, merged keys are bounded."""

    MERGED = 1_000

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > self.MERGED:
            raise yaml.MarkedYAMLError(problem="too many keys are merged", problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back."""


for _yaml in (_Loader, _Dumper):
    # YAML 1.1 takes `1e-3` for text, since it has no dot
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: str | Path, *, base: RunConfig | None = None) -> RunConfig:
    """Reads a run configuration; keys that the file leaves out keep the value of `base` (default: the defaults).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, or a value out of range.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: its lists or mappings are nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return from_dict(RunConfig, {} if values is None else values, base=base)


def write_yaml(config: RunConfig, path: str | Path) -> None:
    """Writes a run configuration so that `read_yaml` gives an equal one."""
    Path(path).write_text(yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")
