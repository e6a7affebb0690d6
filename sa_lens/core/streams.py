"""The ablated stream of an unmodified transformer: a recorded clean pass, and hooks for an ablated pass.

The ablated stream at position t takes its query, its own key and its own value from itself, and the keys and values
of earlier positions from the clean stream. Two corrections by hooks turn an ordinary pass into that:

    scores  += q^a . (k^c - k^a) / scale     off the diagonal
    z       += pattern . (v^c - v^a)         off the diagonal

after which the gates mask `z` and `post`. Hooks that write (scores, z, post) run before the user's hooks, hooks that
read (q, k, v, pattern) after them, so a user sees and may edit the final values.

Nothing here knows about tokenizers, losses or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint

from sa_lens.core.gate import Gate
from sa_lens.core.gated import GatedTransformer
from sa_lens.core.pass_hooks import Ablation, AttachedHook, Hooks, pause_traces, running_traces


@dataclass
class CleanPass:
    """Results of the clean pass that the ablated pass needs; lists have one entry per layer."""

    keys: list[Float[Tensor, "batch pos kv_head d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "batch pos kv_head d_head"]] = field(default_factory=list)
    resid_pre: list[Float[Tensor, "batch pos d_model"]] = field(default_factory=list)
    resid_post: Float[Tensor, "batch pos d_model"] | None = None
    """Residual stream where the pass stopped."""
    final: Float[Tensor, "batch pos d_model"] | None = None
    """Output of the final LayerNorm; None if the pass stopped early and no gate asked for it."""


def resolve_hooks(points: Mapping[str, HookPoint], hooks: Hooks) -> list[AttachedHook]:
    """Returns the hook points that hooks in TransformerLens's form name.

    Raises:
        ValueError: a name that is no hook point, or a filter that matches none, or a gate's hook point (gates do not
            run in the clean pass).
    """
    resolved: list[AttachedHook] = []

    for name, function in hooks:
        matches = [n for n in points if (n == name if isinstance(name, str) else name(n))]
        if not matches:
            raise ValueError(f"clean_hooks: no hook point matches {name!r}; see model.hook_dict for the names")
        for match in matches:
            if match.rsplit(".", 1)[0].endswith("_gate"):
                raise ValueError(
                    f"clean_hooks: {match!r} never fires in the clean pass; edit it with model.run_with_hooks instead"
                )
            resolved.append((points[match], partial(function, hook=points[match]), False))
    return resolved


def run_clean_pass(
    model: GatedTransformer,
    forward: Callable[..., Any],
    inputs: Any,
    kwargs: dict[str, Any],
    ablation: Ablation,
    *,
    stop_at_layer: int | None = None,
    want_keys: bool = True,
    want_final: bool = False,
) -> CleanPass:
    """Runs the clean stream and records what the ablated pass needs of it.

    Args:
        forward: the plain forward of the transformer.
        stop_at_layer: layer at which the caller's pass stops; honoured unless a gate needs the end.
        want_keys: whether keys and values are needed (they are, unless the ablation is at one position).
        want_final: whether the final LayerNorm's output is needed whatever the gates read.
    """
    record = CleanPass()
    n_layers = model.cfg.n_layers
    to_the_end = want_final or model.gates.reads_global or stop_at_layer is None
    stop = n_layers if to_the_end else stop_at_layer

    readers: list[AttachedHook] = []
    for block in model.blocks:
        readers.append((block.hook_resid_pre, record.resid_pre.append, False))
        if want_keys:
            key_point, _ = rotated_key_and_query(block.attn)
            readers.append((key_point, record.keys.append, False))
            readers.append((block.attn.hook_v, record.values.append, False))
    plain = {key: value for key, value in kwargs.items() if key not in ("return_type", "stop_at_layer")}
    edits = resolve_hooks(model.hook_dict, ablation.clean_hooks)
    # gates that read the ablated stream see the user's edits there
    silent = ablation.masks != "live" or model.gates.reads_ablated
    if not silent and running_traces(model):
        raise ValueError(
            "masks='live' runs your edits in two passes, but a trace of nnsight follows a single pass: use "
            "masks='frozen', or run_with_hooks in place of the trace"
        )
    with pause_traces(model), model._streams.attach([*edits, *readers], silent=silent):
        record.resid_post = forward(inputs, stop_at_layer=stop, **plain)
        if want_final or model.gates.reads_global:
            normed = model.cfg.normalization_type is not None
            record.final = model.ln_final(record.resid_post) if normed else record.resid_post
    return record


class _KeyValueMix:
    """Replaces the keys and values of earlier positions by clean ones, in one attention layer of an ablated pass."""

    def __init__(
        self,
        attn: Any,
        clean_keys: Float[Tensor, "batch key kv_head d_head"],
        clean_values: Float[Tensor, "batch pos kv_head d_head"],
    ) -> None:
        self.attn = attn
        self.clean_keys = clean_keys
        self.clean_values = clean_values
        self.seen: dict[str, Tensor] = {}

    def hooks(self) -> list[AttachedHook]:
        key_point, query_point = rotated_key_and_query(self.attn)

        def keep(name: str) -> Callable[[Tensor], None]:
            return partial(self.seen.__setitem__, name)

        return [
            (query_point, keep("q"), False),
            (key_point, keep("k"), False),
            (self.attn.hook_v, keep("v"), False),
            (self.attn.hook_attn_scores, self.correct_scores, True),
            (self.attn.hook_pattern, keep("pattern"), False),
        ]

    def correct_scores(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Computes the scores of earlier positions against their clean keys."""
        q = self.seen["q"]
        difference = self._per_head(self.clean_keys - self.seen["k"], q.shape[1])
        correction = torch.einsum("bqhd,bkhd->bhqk", q / self.attn.attn_scale, difference)
        # written to in place, so that there is only one matrix of this size
        correction.diagonal(dim1=-2, dim2=-1).zero_()
        cached = scores.shape[-1] - correction.shape[-1]
        if cached:
            # columns of cached keys, which are clean already
            correction = torch.nn.functional.pad(correction, (cached, 0))
        return correction.add_(scores)

    def correct_z(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Computes `z` with the clean values of earlier positions, and deletes what was recorded."""
        new = z.shape[1]
        difference = self._per_head(self.clean_values - self.seen["v"], new)
        pattern = self.seen["pattern"][..., -new:].to(difference.dtype)
        self.seen.clear()
        own = pattern.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
        return z + torch.einsum("bhqk,bkhd->bqhd", pattern, difference) - own * difference

    def _per_head(
        self, x: Float[Tensor, "batch key kv_head d_head"], new: int
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Returns the last `new` positions, with grouped keys or values repeated for each head that shares them."""
        return x[:, -new:].repeat_interleave(self.attn.cfg.n_heads // x.shape[2], dim=2)


def rotated_key_and_query(attn: Any) -> tuple[HookPoint, HookPoint]:
    """Returns the hook points of the keys and queries that enter the dot product."""
    if attn.cfg.positional_embedding_type == "rotary":
        return attn.hook_rot_k, attn.hook_rot_q
    return attn.hook_k, attn.hook_q


def position_mask(position: int | Sequence[int] | Tensor, batch: int, length: int) -> Bool[Tensor, "batch pos"]:
    """Returns a mask that is True at the position of each prompt.

    Raises:
        ValueError: a position is outside the prompt, or the number of positions is not that of the prompts.
    """
    chosen = torch.as_tensor(position).reshape(-1).cpu()
    if chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
        raise ValueError(f"position={position!r} must be a whole number, or one whole number per prompt")
    if len(chosen) not in (1, batch):
        raise ValueError(
            f"position has {len(chosen)} entries, but there are {batch} prompts: give one position, or one per prompt"
        )
    outside = (chosen < -length) | (chosen >= length)
    if outside.any():
        raise ValueError(
            f"position={int(chosen[outside][0])} lies outside the prompt of {length} tokens: "
            f"it must be from {-length} to {length - 1}"
        )
    return (torch.arange(length) == chosen.remainder(length)[:, None]).expand(batch, length)


def ablated_hooks(
    model: GatedTransformer,
    clean: CleanPass | None,
    ablation: Ablation,
    stop_at_layer: int | None,
    recorded: Mapping[str, Tensor] | None = None,
) -> list[AttachedHook]:
    """Returns the hooks that turn an ordinary pass into the ablated pass.

    Args:
        clean: the recorded clean pass; None if the ablation is at one position and no gate reads the clean stream or
            all masks are given.
        recorded: scores of gates that read the ablated stream, from `record_scores`; None: they read this pass.
    """
    hooks: list[AttachedHook] = []
    for layer, block in list(enumerate(model.blocks))[:stop_at_layer]:
        own: dict[str, Tensor] = {}
        if model.gates.reads_ablated and recorded is None:
            hooks.append((block.hook_resid_pre, partial(own.__setitem__, "resid_pre"), False))
        mix = None
        if ablation.position is None and clean is not None:
            mix = _KeyValueMix(block.attn, clean.keys[layer], clean.values[layer])
            hooks += mix.hooks()
        for gate_name, point in gated_points(block):
            gate = getattr(block, gate_name)
            mask = ablation.given.get(f"blocks.{layer}.{gate_name}.hook_mask")
            read: Callable[[], Tensor] | None = None
            if mask is None and recorded is not None:
                read = partial(recorded.__getitem__, f"blocks.{layer}.{gate_name}")
            elif mask is None and model.gates.reads_ablated:
                read = partial(_own_scores, gate, own)
            elif mask is None:
                assert clean is not None
                read = partial(gate.project, clean.resid_pre[layer], clean.final)
            correct = mix.correct_z if mix is not None and gate_name == "attn_gate" else None
            hooks.append((point, _gate_hook(gate, read, mask, correct, ablation.position), True))
    return hooks


def _own_scores(gate: Gate, own: Mapping[str, Tensor]) -> Tensor:
    """Returns the scores of a gate that reads the ablated pass itself."""
    return gate.project(own["resid_pre"], None)


def record_scores(
    model: GatedTransformer,
    forward: Callable[..., Any],
    inputs: Any,
    kwargs: dict[str, Any],
    clean: CleanPass | None,
    ablation: Ablation,
    stop_at_layer: int | None = None,
) -> dict[str, Tensor]:
    """Returns the scores of gates that read the ablated stream, by gate, from an ablated pass without user hooks.

    Masks that the caller gave do not act in it.
    """
    scores: dict[str, Tensor] = {}
    stop = model.cfg.n_layers if stop_at_layer is None else stop_at_layer
    hooks = ablated_hooks(model, clean, replace(ablation, masks="live"), stop)
    for layer, block in list(enumerate(model.blocks))[:stop]:
        for name, _ in gated_points(block):
            keep = partial(scores.__setitem__, f"blocks.{layer}.{name}")
            hooks.append((getattr(block, name).hook_scores, keep, False))
    plain = {key: value for key, value in kwargs.items() if key not in ("return_type", "stop_at_layer")}
    with pause_traces(model), model._streams.attach(hooks, silent=True):
        forward(inputs, stop_at_layer=stop, **plain)
    return scores


def _gate_hook(
    gate: Gate,
    read: Callable[[], Tensor] | None,
    mask: Tensor | None,
    correct: Callable[[Tensor], Tensor] | None,
    position: int | Sequence[int] | Tensor | None,
) -> Callable[[Tensor], Tensor]:
    def mask_units(x: Tensor) -> Tensor:
        if correct is not None:
            x = correct(x)
        if mask is not None and mask.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"the given mask is for {mask.shape[0]} prompts of {mask.shape[1]} tokens, but the input is "
                f"{x.shape[0]} prompts of {x.shape[1]}: give the masks of the same tokens"
            )
        where = None if position is None else position_mask(position, *x.shape[:2]).to(x.device)
        return gate(x, None if read is None else read(), mask, where)

    return mask_units


def gated_points(block: Any) -> list[tuple[str, HookPoint]]:
    """Returns (name of the gate, hook point that it masks) for each gate of a layer."""
    points = [("attn_gate", block.attn.hook_z)]
    if hasattr(block, "mlp_gate"):
        points.append(("mlp_gate", block.mlp.hook_post))
    return points


def copy_cache(cache: TransformerLensKeyValueCache) -> TransformerLensKeyValueCache:
    """Returns a key-value cache with the same entries, to which can be appended without changing the original."""
    entries = [TransformerLensKeyValueCacheEntry(e.past_keys, e.past_values, e.frozen) for e in cache.entries]
    return TransformerLensKeyValueCache(entries, cache.previous_attention_mask, cache.frozen)
