"""Weights of the paper's own code, in and out (a GPT-Neo with ablation heads; arXiv 2505.00509)."""

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

_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_ATTENTION_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)")

_OUTSIDE_LAYERS = {
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "lm_head.weight",
    *(f"{head}_ablations_head.{part}" for head in ("attention", "neuron") for part in ("weight", "bias")),
}


def load(cls: type[Model], source: str | Path | Mapping[str, Tensor], gates: GateConfig, n_heads: int = 16) -> Model:
    """A model with the weights of the reference; sizes and scope come from the shapes, the dtype is kept.

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
    state = _opened(source)
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
    """The model's weights under the reference's names.

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
        "transformer.wte.weight": state["embed.W_E"],
        "lm_head.weight": state["embed.W_E"],
        "transformer.wpe.weight": state["pos_embed.W_pos"],
        "transformer.ln_f.weight": state["ln_final.w"],
        "transformer.ln_f.bias": state["ln_final.b"],
    }
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for i in (1, 2):
            out[f"{theirs}.ln_{i}.weight"] = state[f"{ours}.ln{i}.w"]
            out[f"{theirs}.ln_{i}.bias"] = state[f"{ours}.ln{i}.b"]
        for letter in "qkv":
            weight = state[f"{ours}.attn.W_{letter.upper()}"]
            out[f"{theirs}.attn.attention.{letter}_proj.weight"] = einops.rearrange(weight, "h m d -> (h d) m")
        out[f"{theirs}.attn.attention.out_proj.weight"] = einops.rearrange(
            state[f"{ours}.attn.W_O"], "h d m -> m (h d)"
        )
        out[f"{theirs}.attn.attention.out_proj.bias"] = state[f"{ours}.attn.b_O"]
        for matrix, name in (("in", "c_fc"), ("out", "c_proj")):
            out[f"{theirs}.mlp.{name}.weight"] = state[f"{ours}.mlp.W_{matrix}"].T
            out[f"{theirs}.mlp.{name}.bias"] = state[f"{ours}.mlp.b_{matrix}"]
        if model.gates.scope == "local":
            for gate, name in (("attn_gate", "attention"), ("mlp_gate", "neuron")):
                out[f"{theirs}.{name}_ablation_head.weight"] = state[f"{ours}.{gate}.W_local"].T
                out[f"{theirs}.{name}_ablation_head.bias"] = state[f"{ours}.{gate}.b_local"]
    if model.gates.scope == "global":
        for gate, name in (("attn_gate", "attention"), ("mlp_gate", "neuron")):
            keys = [f"blocks.{layer}.{gate}" for layer in range(cfg.n_layers)]
            out[f"{name}_ablations_head.weight"] = torch.cat([state[f"{k}.W_global"].T for k in keys])
            out[f"{name}_ablations_head.bias"] = torch.cat([state[f"{k}.b_global"] for k in keys])
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def _opened(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    layers = {int(m.group(1)) for name in state if (m := _LAYER.match(name))}
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
    heads = {"h": cfg.n_heads}
    out = {
        "embed.W_E": state["transformer.wte.weight"],
        "pos_embed.W_pos": state["transformer.wpe.weight"],
        "unembed.W_U": state.get("lm_head.weight", state["transformer.wte.weight"]).T,
    }
    names = {"ln_1.weight": "ln1.w", "ln_1.bias": "ln1.b", "ln_2.weight": "ln2.w", "ln_2.bias": "ln2.b"}
    unknown = []
    for name, tensor in state.items():
        match = _LAYER.match(name)
        if match is None:
            if name not in _OUTSIDE_LAYERS:
                unknown.append(name)
            continue
        rest, ours = name[match.end() :], f"blocks.{match.group(1)}"
        if rest in names:
            out[f"{ours}.{names[rest]}"] = tensor
        elif found := re.fullmatch(r"attn\.attention\.([qkv])_proj\.weight", rest):
            out[f"{ours}.attn.W_{found[1].upper()}"] = einops.rearrange(tensor, "(h d) m -> h m d", **heads)
        elif rest == "attn.attention.out_proj.weight":
            out[f"{ours}.attn.W_O"] = einops.rearrange(tensor, "m (h d) -> h d m", **heads)
        elif rest == "attn.attention.out_proj.bias":
            out[f"{ours}.attn.b_O"] = tensor
        elif found := re.fullmatch(r"mlp\.(c_fc|c_proj)\.(weight|bias)", rest):
            side = "in" if found[1] == "c_fc" else "out"
            out[f"{ours}.mlp.{'W' if found[2] == 'weight' else 'b'}_{side}"] = (
                tensor.T if found[2] == "weight" else tensor
            )
        elif found := re.fullmatch(r"(attention|neuron)_ablation_head\.(weight|bias)", rest):
            gate = "attn_gate" if found[1] == "attention" else "mlp_gate"
            key = f"{ours}.{gate}.{'W' if found[2] == 'weight' else 'b'}_local"
            out[key] = tensor.T if found[2] == "weight" else tensor
        else:
            unknown.append(name)
    unknown = [name for name in unknown if not _ATTENTION_BUFFER.fullmatch(name)]
    if unknown:
        raise ValueError(f"the reference has no weight {unknown[0]!r}: it would be lost")
    for letter in ("weight", "bias"):
        if f"transformer.ln_f.{letter}" in state:
            out[f"ln_final.{letter[0]}"] = state[f"transformer.ln_f.{letter}"]
        for head, gate in (("attention", "attn_gate"), ("neuron", "mlp_gate")):
            name = f"{head}_ablations_head.{letter}"
            if name not in state:
                continue
            if len(state[name]) % cfg.n_layers:
                raise ValueError(
                    f"{name} has {len(state[name])} rows, which {cfg.n_layers} layers cannot share equally"
                )
            for layer, part in enumerate(state[name].chunk(cfg.n_layers)):
                key = f"blocks.{layer}.{gate}.{'W' if letter == 'weight' else 'b'}_global"
                out[key] = part.T if letter == "weight" else part
    return out
