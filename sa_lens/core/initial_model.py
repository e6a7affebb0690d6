"""The model from which a training run starts, if it does not start from random weights."""

from __future__ import annotations

from pathlib import Path

from sa_lens.catalogue import shipped_folder
from sa_lens.config import GateConfig
from sa_lens.core.base import TRANSFORMER_LENS, HookedTransformer, ignore_deprecation, official_name
from sa_lens.core.bridge import hooked_from_bridge
from sa_lens.core.gate import belongs_to_gate
from sa_lens.core.hugging_face import is_hugging_face
from sa_lens.core.model import SelfAblatingTransformer


def initial_model(name: str | Path, gates: GateConfig, *, seed: int = 0, n_ctx: int = 1) -> SelfAblatingTransformer:
    """Returns a model on the CPU with the weights of another model and the given gates.

    Gate weights are kept if the other model has gates of the same scope, units and scores (k, surrogate and temperature
    may differ); otherwise the gates are fresh.

    Args:
        name: a run folder, the name of a shipped model, a folder or GGUF file of a model of `transformers`, a Hub id of
            a model that sa_lens saved, or a name that TransformerLens knows (its weights are taken unprocessed).
        gates: the gates of the returned model.
        seed: seed of fresh gates.
        n_ctx: length of the sequences to be run, for a folder or GGUF file.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged or foreign file, a model that needs code from the Hub, or an architecture that gates do
            not fit.
    """
    local = shipped_folder(name) is not None or Path(name).exists()
    if local and shipped_folder(name) is None and is_hugging_face(name):
        return SelfAblatingTransformer.from_hugging_face(name, gates, n_ctx=n_ctx, seed=seed)
    known = None if local else official_name(str(name))
    base = (
        SelfAblatingTransformer.from_pretrained(name, device="cpu")
        if known is None
        else _transformer_lens_model(str(name), known)
    )
    model = SelfAblatingTransformer.from_hooked(base, gates, seed=seed)
    same = isinstance(base, SelfAblatingTransformer) and base.gates.scores == gates.scores
    kept = {key: value for key, value in base.state_dict().items() if same and belongs_to_gate(key)}
    fresh = {key: value for key, value in model.state_dict().items() if belongs_to_gate(key)}
    if kept and {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in fresh.items()}:
        model.load_state_dict({**model.state_dict(), **kept})
    return model


def _transformer_lens_model(name: str, known: str) -> HookedTransformer:
    """Returns the unprocessed model that TransformerLens loads by this name; `known` is its Hub id."""
    if TRANSFORMER_LENS >= 4:
        from transformer_lens.model_bridge import TransformerBridge

        return hooked_from_bridge(TransformerBridge.boot_transformers(known, device="cpu", trust_remote_code=False))
    from transformer_lens.loading_from_pretrained import NEED_REMOTE_CODE_MODELS

    if known.startswith(NEED_REMOTE_CODE_MODELS):
        raise ValueError(
            f"TransformerLens loads {name!r} with Python code from the Hub, which is never run here; load it "
            "yourself and pass it to SelfAblatingTransformer.from_hooked(model, GateConfig(...))"
        )
    with ignore_deprecation():
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu", trust_remote_code=False)
