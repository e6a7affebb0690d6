"""Export of models to formats of other programs, without the gates unless the format has a place for them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import einops
import torch
from torch import Tensor

from sa_lens.core import architecture, reference
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.core.coverage import Coverage
from sa_lens.core.model import SelfAblatingTransformer
from sa_lens.core.save_and_load import (
    CONFIG,
    WEIGHTS,
    describe,
    name_failed_writes,
    save_tokenizer,
    write_weights,
)
from sa_lens.data.tokenizers import boundary_tokens
from sa_lens.data.whole_files import atomic_write, staged_folder
from sa_lens.places import output_file, output_folder

_GPT2 = Coverage(normalizations={"LN", "LNPre"}, activations={"gelu_new", "gelu", "relu", "silu"})
"""Architectures that a GPT-2 folder can express."""


def to_hooked(model: SelfAblatingTransformer, folder: str | Path) -> str:
    """Writes the clean stream as a plain HookedTransformer: config JSON, safetensors, tokenizer; all or nothing.

    Returns:
        Five lines of Python that load it, without sa_lens where TransformerLens has a HookedTransformer (below 4).

    Raises:
        FileExistsError: the folder holds something.
    """
    folder = output_folder(folder, free=True)
    plain = model.to_hooked_transformer()
    described = describe(model)
    cfg = described["model"] | {"tie_word_embeddings": False, "init_weights": False}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in plain.state_dict().items()}
    with name_failed_writes(folder), staged_folder(folder, last=CONFIG) as temporary:
        write_weights(weights, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(cfg, indent=2), encoding="utf-8")
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)
    has_tokenizer = model.tokenizer is not None
    tokenizer = f", tokenizer=transformers.AutoTokenizer.from_pretrained({str(folder)!r})" if has_tokenizer else ""
    dtype = "" if described["dtype"] == "float32" else f", dtype=torch.{described['dtype']}"
    package = "transformer_lens" if TRANSFORMER_LENS < 4 else "sa_lens"
    return "\n".join(
        [
            "import json, pathlib, torch, transformers, safetensors.torch",
            f"from {package} import HookedTransformer, HookedTransformerConfig",
            f"cfg = HookedTransformerConfig(**json.loads(pathlib.Path({str(folder / CONFIG)!r}).read_text()){dtype})",
            f"model = HookedTransformer(cfg{tokenizer})",
            f"model.load_state_dict(safetensors.torch.load_file({str(folder / WEIGHTS)!r}))",
        ]
    )


def to_reference(model: SelfAblatingTransformer, path: str | Path) -> Path:
    """Writes a state dict with the reference's names, which `from_reference` and the paper's code read.

    Raises:
        ValueError: an architecture or a nonzero bias that the reference does not have.
        IsADirectoryError: the path is a folder.
    """
    path = output_file(path)
    state = reference.save(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(state, content)
    with name_failed_writes(path):
        atomic_write(path, content.getvalue())
    return path


def to_hf(model: SelfAblatingTransformer, folder: str | Path) -> Path:
    """Writes the clean stream as a GPT-2 folder that `AutoModelForCausalLM` loads offline with the same logits.

    A model without attention scale has sqrt(d_head) folded into its queries.

    Raises:
        ValueError: an architecture, or a nonzero bias of the logits, that GPT-2 does not have.
        FileExistsError: the folder holds something.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = architecture.actual_config(model)
    reason = _GPT2.reason_against(cfg)
    if reason is None and cfg.n_heads * cfg.d_head != cfg.d_model:
        reason = "heads that do not add up to the residual stream (n_heads * d_head = d_model)"
    if reason is None and cfg.d_vocab_out != cfg.d_vocab:
        reason = "other logits than tokens"
    if reason is None and bool(model.unembed.b_U.any()):
        reason = "a bias on the logits"
    if reason is not None:
        raise ValueError(f"GPT-2 cannot express this model, which has {reason}. Use --to hooked")
    folder = output_folder(folder, free=True)
    begin, end = (None, None) if model.tokenizer is None else boundary_tokens(model.tokenizer)
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.d_vocab,
            n_positions=cfg.n_ctx,
            n_embd=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            n_inner=cfg.d_mlp,
            activation_function=cfg.act_fn,
            layer_norm_epsilon=cfg.eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=begin,
            eos_token_id=end,
            tie_word_embeddings=model.tied,
            dtype=cfg.dtype,
        )
    )
    torch.nn.Module.to(hf, cfg.dtype)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    hf.load_state_dict(_gpt2_state(model, state), strict=True)
    with name_failed_writes(folder), staged_folder(folder, last=CONFIG) as temporary:
        hf.save_pretrained(temporary)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)
    return folder


def _gpt2_state(model: SelfAblatingTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    cfg = architecture.actual_config(model)
    scale = math.sqrt(cfg.d_head)
    divisor = float(model.blocks[0].attn.attn_scale)
    ones, zeros = torch.ones(cfg.d_model, dtype=cfg.dtype), torch.zeros(cfg.d_model, dtype=cfg.dtype)

    def norm(ours: str, theirs: str) -> dict[str, Tensor]:
        return {f"{theirs}.weight": state.get(f"{ours}.w", ones), f"{theirs}.bias": state.get(f"{ours}.b", zeros)}

    out = {
        "transformer.wte.weight": state["embed.W_E"],
        "transformer.wpe.weight": state["pos_embed.W_pos"],
        "lm_head.weight": state["unembed.W_U"].T.contiguous(),
        **norm("ln_final", "transformer.ln_f"),
    }
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        out |= norm(f"{ours}.ln1", f"{theirs}.ln_1") | norm(f"{ours}.ln2", f"{theirs}.ln_2")
        factor = {"Q": scale / divisor, "K": 1.0, "V": 1.0}
        weights = [einops.rearrange(state[f"{ours}.attn.W_{x}"], "h m d -> m (h d)") * f for x, f in factor.items()]
        biases = [state[f"{ours}.attn.b_{x}"].flatten() * f for x, f in factor.items()]
        out[f"{theirs}.attn.c_attn.weight"] = torch.cat(weights, dim=1)
        out[f"{theirs}.attn.c_attn.bias"] = torch.cat(biases)
        out[f"{theirs}.attn.c_proj.weight"] = einops.rearrange(state[f"{ours}.attn.W_O"], "h d m -> (h d) m")
        out[f"{theirs}.attn.c_proj.bias"] = state[f"{ours}.attn.b_O"]
        for matrix, name in (("in", "c_fc"), ("out", "c_proj")):
            out[f"{theirs}.mlp.{name}.weight"] = state[f"{ours}.mlp.W_{matrix}"]
            out[f"{theirs}.mlp.{name}.bias"] = state[f"{ours}.mlp.b_{matrix}"]
    return out
