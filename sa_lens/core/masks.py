"""The masks of a text without its ablated stream: gates read the clean stream alone, so a clean pass gives them."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.model import SelfAblatingTransformer
from sa_lens.core.streams import gated_points


def masks_of(
    model: SelfAblatingTransformer, tokens: Int[Tensor, "batch pos"]
) -> dict[str, list[Float[Tensor, "batch pos ..."]]]:
    """Masks by name of gate (`attn_gate`, `mlp_gate`), a tensor a layer, as in `run_both_passes` at half its cost.

    Raises:
        ValueError: a model without gates.
    """
    if not model.gates.gated:
        raise ValueError("masks_of needs gates, but this model has none (gates.scope='none')")
    with model.clean():
        resid, cache = model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_pre"), stop_at_layer=model.cfg.n_layers
        )
    final = model.ln_final(resid) if model.cfg.normalization_type is not None else resid
    masks: dict[str, list[Tensor]] = {"attn_gate": [], "mlp_gate": []}
    for layer, block in enumerate(model.blocks):
        for name, _ in gated_points(block):
            gate = getattr(block, name)
            local = cache[f"blocks.{layer}.hook_resid_pre"]
            masks[name].append(gate.select(gate.project(local, final)))
    return masks
