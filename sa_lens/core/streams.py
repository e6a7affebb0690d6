"""The two streams of an unmodified transformer: a recorded clean pass, and hooks that make an ablated pass of it.

The ablated stream at position t takes its query, its own key and its own value from itself, and the keys and values
of earlier positions from the clean stream. Two corrections by hooks turn an ordinary pass into that:

    scores  += q^a . (k^c - k^a) / scale     off the diagonal
    z       += pattern . (v^c - v^a)         off the diagonal

after which the gates mask `z` and `post`. Hooks that write (scores, z, post) run before the user's hooks, hooks that
read (q, k, v, pattern) after them, so a user sees and may edit the final values.

Nothing here knows about tokenizers, losses or files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint

from sa_lens.config import Masks
from sa_lens.core.gate import Gate

if TYPE_CHECKING:
    from sa_lens.core.model import SelfAblatingTransformer

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]
"""Hooks as TransformerLens takes them: (name or filter of names, function of the activation and `hook=`)."""

AttachedHook = tuple[HookPoint, Callable[[Tensor], Tensor | None], bool]
"""(hook point, function of the activation, whether it runs before the user's hooks)."""


@dataclass(frozen=True)
class Ablation:
    """What `model.ablated(...)` was asked for; see there."""

    position: int | Sequence[int] | Tensor | None = None
    masks: Masks | Mapping[str, Tensor] = "frozen"
    clean_hooks: Hooks = ()

    @property
    def given(self) -> Mapping[str, Tensor]:
        """The masks that the caller gave, by hook name."""
        return {} if isinstance(self.masks, str) else self.masks


class _PassHooks:
    """What one pass runs at hook points beside the user's hooks, by identity of the point."""

    def __init__(self, hooks: Sequence[AttachedHook], silent: bool) -> None:
        self.silent = silent
        self.before: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        self.after: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        for point, function, first in hooks:
            if not isinstance(point, StreamPoint):
                raise ValueError(
                    f"a {type(point).__name__} stands where this model had a hook point, so that its streams cannot be "
                    "told apart: put the hook point back, and use run_with_hooks instead"
                )
            (self.before if first else self.after).setdefault(id(point), []).append(function)


class _ThreadState(threading.local):
    """What one thread does on one model."""

    pass_hooks: _PassHooks | None = None
    """What its current pass does at the hook points."""

    def __init__(self) -> None:
        self.stack: list[Ablation | None] = []
        """Its nested contexts, innermost last; None stands for the clean stream."""


class StreamState:
    """Which stream each thread runs on one model, and what its pass does at the hook points.

    Nothing of it is shared between threads, and no lock is held while a pass runs. Copies of a model start with a fresh
    state on the clean stream.
    """

    def __init__(self) -> None:
        self.of_thread = _ThreadState()
        self.threads: set[int] = set()
        """Threads that have run the model."""
        self.lock = threading.Lock()
        """Held while hooks are attached or removed, never while user code runs."""

    @property
    def current(self) -> Ablation | None:
        """The innermost context of this thread; None: the clean stream."""
        stack = self.of_thread.stack
        return stack[-1] if stack else None

    @contextmanager
    def entered(self, ablation: Ablation | None) -> Iterator[None]:
        """Makes `ablation` the innermost context of this thread."""
        stack = self.of_thread.stack
        stack.append(ablation)
        try:
            yield
        finally:
            stack.pop()

    @contextmanager
    def attached(self, hooks: Sequence[AttachedHook] = (), *, silent: bool = False) -> Iterator[None]:
        """Within the context, passes of this thread run these hooks, and no others of an outer pass.

        Args:
            silent: no hook of the user fires.
        """
        outer = self.of_thread.pass_hooks
        self.of_thread.pass_hooks = _PassHooks(hooks, silent)
        try:
            yield
        finally:
            self.of_thread.pass_hooks = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamState:
        return StreamState()

    def __reduce__(self) -> tuple[type[StreamState], tuple[()]]:
        return StreamState, ()


class StreamPoint(HookPoint):
    """A hook point that also runs what a pass of the current thread attaches to it; see `StreamState.attached`."""

    streams: StreamState

    def __call__(self, x: Tensor) -> Any:
        """The value after the hooks that write, the user's, and those that read."""
        own = self.streams.of_thread.pass_hooks
        if own is None:
            return HookPoint.__call__(self, x)
        for function in own.before.get(id(self), ()):
            written = function(x)
            x = x if written is None else written
        if not own.silent:
            x = HookPoint.__call__(self, x)
        for function in own.after.get(id(self), ()):
            written = function(x)
            x = x if written is None else written
        return x


@contextmanager
def user_hooks(
    model: SelfAblatingTransformer, hooks: Sequence[tuple[Any, Any, Literal["fwd", "bwd"]]], *, remove: bool
) -> Iterator[None]:
    """Attaches hooks of the user that fire, while the context lasts, in passes of this thread alone.

    Args:
        hooks: (name or filter of names, function, direction), as TransformerLens takes them.
        remove: whether they are taken away at the end; otherwise they stay, for all threads.
    """
    streams, owner = model._streams, threading.get_ident()
    everybodys = False

    def mine(function: Any) -> Any:
        def hook(value: Any, *, hook: Any) -> Any:
            thread = threading.get_ident()
            # gradients of a GPU come in threads of torch, which never run the model
            if everybodys or thread == owner or thread not in streams.threads:
                return function(value, hook=hook)
            return None

        return hook

    attached: list[tuple[Any, Any]] = []
    try:
        for name, function, direction in hooks:
            names = [name] if isinstance(name, str) else [n for n in model.hook_dict if name(n)]
            points: list[Any] = [model.mod_dict[n] for n in names]
            for point in points:
                with streams.lock:
                    point.add_hook(mine(function), dir=direction, level=model.context_level)
                    handle = (point.fwd_hooks if direction == "fwd" else point.bwd_hooks)[-1]
                attached.append((point, handle))
                handle.user_hook = function
        yield
    finally:
        everybodys = not remove
        if remove:
            with streams.lock:
                for point, handle in attached:
                    handle.hook.remove()
                    point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]
                    point.bwd_hooks = [other for other in point.bwd_hooks if other is not handle]


@dataclass
class CleanPass:
    """What the ablated pass needs of the clean one; lists have an entry a layer."""

    keys: list[Float[Tensor, "batch pos kv_head d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "batch pos kv_head d_head"]] = field(default_factory=list)
    resid_pre: list[Float[Tensor, "batch pos d_model"]] = field(default_factory=list)
    resid_post: Float[Tensor, "batch pos d_model"] | None = None
    """Residual stream where the pass stopped."""
    final: Float[Tensor, "batch pos d_model"] | None = None
    """Output of the final LayerNorm; None if the pass stopped early and no gate asked for it."""


def resolve_hooks(points: Mapping[str, HookPoint], hooks: Hooks) -> list[AttachedHook]:
    """The hook points that TransformerLens-style hooks name.

    Raises:
        ValueError: a name that is no hook point, or a filter that matches none, or a gate's hook point (gates do not
            run in the clean pass).
    """
    resolved: list[AttachedHook] = []

    def bound(function: Callable[..., Any], point: HookPoint) -> Callable[[Tensor], Tensor | None]:
        return lambda x: function(x, hook=point)

    for name, function in hooks:
        matches = [n for n in points if (n == name if isinstance(name, str) else name(n))]
        if not matches:
            raise ValueError(f"clean_hooks: no hook point matches {name!r}; see model.hook_dict for the names")
        for match in matches:
            if match.rsplit(".", 1)[0].endswith("_gate"):
                raise ValueError(
                    f"clean_hooks: {match!r} never fires in the clean pass; edit it with model.run_with_hooks instead"
                )
            resolved.append((points[match], bound(function, points[match]), False))
    return resolved


def run_clean_pass(
    model: SelfAblatingTransformer,
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

    def keep(into: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda x: into.append(x)

    readers: list[AttachedHook] = []
    for block in model.blocks:
        readers.append((block.hook_resid_pre, keep(record.resid_pre), False))
        if want_keys:
            key_point, _ = rotated_key_and_query(block.attn)
            readers.append((key_point, keep(record.keys), False))
            readers.append((block.attn.hook_v, keep(record.values), False))
    plain = {key: value for key, value in kwargs.items() if key not in ("return_type", "stop_at_layer")}
    edits = resolve_hooks(model.hook_dict, ablation.clean_hooks)
    with model._streams.attached([*edits, *readers], silent=ablation.masks != "live"):
        record.resid_post = forward(inputs, stop_at_layer=stop, **plain)
        if want_final or model.gates.reads_global:
            normed = model.cfg.normalization_type is not None
            record.final = model.ln_final(record.resid_post) if normed else record.resid_post
    return record


class _KeyValueMix:
    """Replaces, in one attention layer of an ablated pass, the keys and values of earlier positions by clean ones."""

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
            return lambda x: self.seen.__setitem__(name, x)

        return [
            (query_point, keep("q"), False),
            (key_point, keep("k"), False),
            (self.attn.hook_v, keep("v"), False),
            (self.attn.hook_attn_scores, self.correct_scores, True),
            (self.attn.hook_pattern, keep("pattern"), False),
        ]

    def correct_scores(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Scores of earlier positions against their clean keys."""
        q = self.seen["q"]
        difference = self._per_head(self.clean_keys - self.seen["k"], q.shape[1])
        correction = torch.einsum("bqhd,bkhd->bhqk", q / self.attn.attn_scale, difference)
        # the matrix is ours, so it can be written to in place: no second one of its size is made
        correction.diagonal(dim1=-2, dim2=-1).zero_()
        cached = scores.shape[-1] - correction.shape[-1]
        if cached:
            # columns of cached keys, which are clean already
            correction = torch.nn.functional.pad(correction, (cached, 0))
        return correction.add_(scores)

    def correct_z(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """`z` with the clean values of earlier positions; forgets what was recorded."""
        new = z.shape[1]
        difference = self._per_head(self.clean_values - self.seen["v"], new)
        pattern = self.seen["pattern"][..., -new:].to(difference.dtype)
        self.seen.clear()
        own = pattern.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
        return z + torch.einsum("bhqk,bkhd->bqhd", pattern, difference) - own * difference

    def _per_head(
        self, x: Float[Tensor, "batch key kv_head d_head"], new: int
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The last `new` positions, grouped keys or values repeated for each head that shares them."""
        return x[:, -new:].repeat_interleave(self.attn.cfg.n_heads // x.shape[2], dim=2)


def rotated_key_and_query(attn: Any) -> tuple[HookPoint, HookPoint]:
    """Hook points of the keys and queries that enter the dot product."""
    if attn.cfg.positional_embedding_type == "rotary":
        return attn.hook_rot_k, attn.hook_rot_q
    return attn.hook_k, attn.hook_q


def position_mask(position: int | Sequence[int] | Tensor, batch: int, length: int) -> Bool[Tensor, "batch pos"]:
    """True at the position of each prompt.

    Raises:
        ValueError: a position outside the prompt, or not one a prompt.
    """
    chosen = torch.as_tensor(position).reshape(-1).cpu()
    if chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
        raise ValueError(f"position={position!r} must be a whole number, or one for each prompt")
    if len(chosen) not in (1, batch):
        raise ValueError(f"position has {len(chosen)} entries, but there are {batch} prompts: give one, or one each")
    outside = (chosen < -length) | (chosen >= length)
    if outside.any():
        raise ValueError(
            f"position={int(chosen[outside][0])} lies outside the prompt of {length} tokens: "
            f"it must be from {-length} to {length - 1}"
        )
    return (torch.arange(length) == chosen.remainder(length)[:, None]).expand(batch, length)


def ablated_hooks(
    model: SelfAblatingTransformer,
    clean: CleanPass | None,
    ablation: Ablation,
    stop_at_layer: int | None,
) -> list[AttachedHook]:
    """The hooks that turn an ordinary pass into the ablated one.

    Args:
        clean: the recorded clean pass; None if all masks are given and the ablation is at one position.
    """
    hooks: list[AttachedHook] = []
    for layer, block in list(enumerate(model.blocks))[:stop_at_layer]:
        local = clean.resid_pre[layer] if clean else None
        final = clean.final if clean else None
        mix = None
        if ablation.position is None and clean is not None:
            mix = _KeyValueMix(block.attn, clean.keys[layer], clean.values[layer])
            hooks += mix.hooks()
        for gate_name, point in gated_points(block):
            gate = getattr(block, gate_name)
            mask = ablation.given.get(f"blocks.{layer}.{gate_name}.hook_mask")
            scores = gate.project(local, final) if mask is None else None
            correct = mix.correct_z if mix is not None and gate_name == "attn_gate" else None
            hooks.append((point, _gate_hook(gate, scores, mask, correct, ablation.position), True))
    return hooks


def _gate_hook(
    gate: Gate,
    scores: Tensor | None,
    mask: Tensor | None,
    correct: Callable[[Tensor], Tensor] | None,
    position: int | Sequence[int] | Tensor | None,
) -> Callable[[Tensor], Tensor]:
    def masked(x: Tensor) -> Tensor:
        if correct is not None:
            x = correct(x)
        if mask is not None and mask.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"the given mask is for {mask.shape[0]} prompts of {mask.shape[1]} tokens, but the input is "
                f"{x.shape[0]} prompts of {x.shape[1]}: give masks of these very tokens"
            )
        where = None if position is None else position_mask(position, *x.shape[:2]).to(x.device)
        return gate(x, scores, mask, where)

    return masked


def gated_points(block: Any) -> list[tuple[str, HookPoint]]:
    """(name of the gate, hook point that it masks) of a layer."""
    points = [("attn_gate", block.attn.hook_z)]
    if hasattr(block, "mlp_gate"):
        points.append(("mlp_gate", block.mlp.hook_post))
    return points


def copy_cache(cache: TransformerLensKeyValueCache) -> TransformerLensKeyValueCache:
    """A key-value cache that starts with the same entries and may be appended to without touching the original."""
    entries = [TransformerLensKeyValueCacheEntry(e.past_keys, e.past_values, e.frozen) for e in cache.entries]
    return TransformerLensKeyValueCache(entries, cache.previous_attention_mask, cache.frozen)
