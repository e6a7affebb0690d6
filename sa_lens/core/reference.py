"""Reading and writing the weights of the paper's own code (a GPT-Neo with ablation heads; arXiv 2505.00509)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import einops
import torch
from torch import Tensor

from sa_lens.config import GateConfig, Scope
from sa_lens.core.architecture import check_weights
from sa_lens.core.base import HookedTransformerConfig
from sa_lens.core.coverage import Coverage
from sa_lens.core.gated import GatedTransformer

Model = TypeVar("Model", bound=GatedTransformer)

_REFERENCE = Coverage(normalizations={"LN"}, activations={"gelu_new"})
"""Architectures that the reference can express."""

_SAME, _TRANSPOSED = "... -> ...", "read write -> write read"
_READ_BY_HEADS, _WRITTEN_BY_HEADS = (
    "head d_model d_head -> (head d_head) d_model",
    "head d_head d_model -> d_model (head d_head)",
)
_GATES = {"attention": "attn_gate", "neuron": "mlp_gate"}
_PARTS = {"weight": ("W", _TRANSPOSED), "bias": ("b", _SAME)}
_NO_WEIGHT = re.compile(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)")


def _names(n_layers: int) -> dict[str, tuple[str, str]]:
    """Returns, for each name of the reference, ours and the rearrangement to theirs, without global gates."""
    names = {
        "transformer.wte.weight": ("embed.W_E", _SAME),
        "transformer.wpe.weight": ("pos_embed.W_pos", _SAME),
        "transformer.ln_f.weight": ("ln_final.w", _SAME),
        "transformer.ln_f.bias": ("ln_final.b", _SAME),
        "lm_head.weight": ("unembed.W_U", _TRANSPOSED),
    }
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        attention = f"{theirs}.attn.attention"
        for i in (1, 2):
            names |= {f"{theirs}.ln_{i}.{part}": (f"{ours}.ln{i}.{part[0]}", _SAME) for part in _PARTS}
        for letter in "qkv":
            names[f"{attention}.{letter}_proj.weight"] = f"{ours}.attn.W_{letter.upper()}", _READ_BY_HEADS
        names[f"{attention}.out_proj.weight"] = f"{ours}.attn.W_O", _WRITTEN_BY_HEADS
        names[f"{attention}.out_proj.bias"] = f"{ours}.attn.b_O", _SAME
        for part, (letter, pattern) in _PARTS.items():
            names[f"{theirs}.mlp.c_fc.{part}"] = f"{ours}.mlp.{letter}_in", pattern
            names[f"{theirs}.mlp.c_proj.{part}"] = f"{ours}.mlp.{letter}_out", pattern
            for kind, gate in _GATES.items():
                names[f"{theirs}.{kind}_ablation_head.{part}"] = f"{ours}.{gate}.{letter}_local", pattern
    return names


def load(cls: type[Model], source: str | Path | Mapping[str, Tensor], gates: GateConfig, n_heads: int = 16) -> Model:
    """Loads a model from weights of the reference; sizes and scope come from the shapes, the dtype is kept.

    Args:
        source: a file that `torch.load(weights_only=True)` reads, or the state dict itself. A dict that holds the
            state dict under `model_state_dict`, `state_dict` or `model` is opened.
        gates: k, kind, surrogate, temperature; the scope must be that of the weights.
        n_heads: number of heads, which no shape holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights missing, unknown or of the wrong shape, another scope, heads that do not divide d_model,
            a file that holds more than weights or is damaged.
    """
    state = _open(source)
    scope = _scope(state)
    if gates.scope != scope:
        raise ValueError(f"gates.scope={gates.scope!r}, but these weights are of scope {scope!r}: pass scope={scope!r}")
    cfg = _config(state, n_heads)
    model = cls(cfg, gates, device="cpu")
    model.qkv_bias = model.unembed_bias = False
    model.freeze_unused_biases()
    converted = _to_hooked(state, cfg)
    expected = {name: p.shape for name, p in model.named_parameters() if name not in model.zero_biases}
    for name, shape in expected.items():
        if name not in converted:
            raise ValueError(f"the reference's weights lack what {name} is made of")
        if converted[name].shape != shape:
            raise ValueError(f"{name}: the reference has shape {tuple(converted[name].shape)}, expected {tuple(shape)}")
    check_weights(converted, cfg.dtype, "the reference's weights cannot be loaded")
    zeros = {name: torch.zeros_like(model.get_parameter(name)) for name in model.zero_biases}
    model.load_base({**converted, **zeros})
    return model


def save(model: GatedTransformer) -> dict[str, Tensor]:
    """Writes the model's weights under the reference's names.

    Raises:
        ValueError: an architecture, or a nonzero bias, that the reference does not have.
    """
    cfg = model.cfg
    reason = _REFERENCE.reason_against(cfg)
    for name, applies in {
        "embeddings that are not tied": not model.tied,
        "an attention scale": cfg.use_attn_scale,
        "heads that do not add up to the residual stream (d_head = d_model / n_heads)": (
            cfg.d_head * cfg.n_heads != cfg.d_model
        ),
        "local and global gates at once": model.gates.scope == "both",
        "gates that read the ablated stream": model.gates.reads_ablated,
        "low-rank gates": model.gates.gated and model.gates.rank is not None,
        "whole heads as attention units": model.gates.gated and model.gates.attn_unit != "channel",
    }.items():
        reason = name if reason is None and applies else reason
    if reason is not None:
        raise ValueError(f"the reference cannot express this model, which has {reason}")
    state = model.state_dict()
    for leaf in ("b_Q", "b_K", "b_V", "b_U"):
        for name in (n for n in state if n.endswith(f".{leaf}")):
            if bool(state[name].any()):
                raise ValueError(f"the reference has no bias {leaf}, but {name} is not zero")
    out = {
        theirs: einops.rearrange(state[ours], pattern)
        for theirs, (ours, pattern) in _names(cfg.n_layers).items()
        if ours in state
    }
    if model.gates.scope == "global":
        for kind, gate in _GATES.items():
            for part, (letter, pattern) in _PARTS.items():
                layers = [state[f"blocks.{layer}.{gate}.{letter}_global"] for layer in range(cfg.n_layers)]
                out[f"{kind}_ablations_head.{part}"] = torch.cat([einops.rearrange(x, pattern) for x in layers])
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def _open(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        loaded: object = dict(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: from_reference takes a .pt file or a state dict")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is not a file of weights alone, or is damaged: {error}") from error
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or "transformer.wte.weight" not in loaded:
        raise ValueError("these are not weights of the reference: there is no transformer.wte.weight among them")
    return {name.removeprefix("module."): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _scope(state: Mapping[str, Tensor]) -> Scope:
    local = any(name.endswith("attention_ablation_head.weight") for name in state)
    global_ = "attention_ablations_head.weight" in state
    return "both" if local and global_ else "local" if local else "global" if global_ else "none"


def _config(state: Mapping[str, Tensor], n_heads: int) -> HookedTransformerConfig:
    embedding = state["transformer.wte.weight"]
    d_vocab, d_model = embedding.shape
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}")
    for name in ("transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"):
        if name not in state:
            raise ValueError(f"the reference's weights lack {name}")
    return HookedTransformerConfig(
        n_layers=len(layers),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=state["transformer.h.0.mlp.c_fc.weight"].shape[0],
        n_ctx=state["transformer.wpe.weight"].shape[0],
        d_vocab=d_vocab,
        act_fn="gelu_new",
        eps=1e-5,
        use_attn_scale=False,
        normalization_type="LN",
        dtype=embedding.dtype,
        tie_word_embeddings=torch.equal(state.get("lm_head.weight", embedding), embedding),
        init_weights=False,
        device="cpu",
    )


def _to_hooked(state: Mapping[str, Tensor], cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    def to_ours(tensor: Tensor, pattern: str) -> Tensor:
        ours, theirs = pattern.split(" -> ")
        return einops.rearrange(tensor, f"{theirs} -> {ours}", **({"head": cfg.n_heads} if "head" in pattern else {}))

    names = _names(cfg.n_layers)
    state = {"lm_head.weight": state["transformer.wte.weight"], **state}
    out = {ours: to_ours(state[theirs], pattern) for theirs, (ours, pattern) in names.items() if theirs in state}
    unknown = [name for name in state if name not in names and not _NO_WEIGHT.fullmatch(name)]
    for kind, gate in _GATES.items():
        for part, (letter, pattern) in _PARTS.items():
            name = f"{kind}_ablations_head.{part}"
            if name not in state:
                continue
            unknown.remove(name)
            if len(state[name]) % cfg.n_layers:
                raise ValueError(
                    f"{name} has {len(state[name])} rows, which {cfg.n_layers} layers cannot share equally"
                )
            for layer, rows in enumerate(state[name].chunk(cfg.n_layers)):
                out[f"blocks.{layer}.{gate}.{letter}_global"] = to_ours(rows, pattern)
    if unknown:
        raise ValueError(f"the reference has no weight {unknown[0]!r}: it would be lost")
    return out
