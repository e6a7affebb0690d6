"""The hooks of a pass, by thread: those of its stream and those of the user."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from sa_lens.config import Masks

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]
"""Hooks as TransformerLens takes them: (name or filter of names, function of the activation and `hook=`)."""

AttachedHook = tuple[HookPoint, Callable[[Tensor], Tensor | None], bool]
"""(hook point, function of the activation, whether it runs before the user's hooks)."""


@dataclass(frozen=True)
class Ablation:
    """The arguments of `model.ablated(...)`; see there."""

    position: int | Sequence[int] | Tensor | None = None
    masks: Masks | Mapping[str, Tensor] = "frozen"
    clean_hooks: Hooks = ()

    @property
    def given(self) -> Mapping[str, Tensor]:
        """The masks that the caller gave, by hook name."""
        return {} if isinstance(self.masks, str) else self.masks


class _PassHooks:
    """The hooks of one pass besides those of the user, by identity of the hook point."""

    def __init__(self, hooks: Sequence[AttachedHook], silent: bool) -> None:
        self.silent = silent
        self.before: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        self.after: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        for point, function, first in hooks:
            if not isinstance(point, StreamPoint):
                raise ValueError(
                    f"a hook point of this model was replaced by a {type(point).__name__}, so its streams cannot be "
                    "distinguished: restore the hook point, and use run_with_hooks instead"
                )
            (self.before if first else self.after).setdefault(id(point), []).append(function)


class _ThreadState(threading.local):
    """The state of one thread on one model."""

    pass_hooks: _PassHooks | None = None
    """What its current pass does at the hook points."""

    def __init__(self) -> None:
        self.stack: list[Ablation | None] = []
        """Its nested contexts, innermost last; None stands for the clean stream."""


class StreamState:
    """The stream that each thread runs on one model, and the hooks of its pass.

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
        """The innermost context of this thread; None stands for the clean stream."""
        stack = self.of_thread.stack
        return stack[-1] if stack else None

    @contextmanager
    def enter(self, ablation: Ablation | None) -> Iterator[None]:
        """Makes `ablation` the innermost context of this thread."""
        stack = self.of_thread.stack
        stack.append(ablation)
        try:
            yield
        finally:
            stack.pop()

    @contextmanager
    def attach(self, hooks: Sequence[AttachedHook] = (), *, silent: bool = False) -> Iterator[None]:
        """Lets passes of this thread run these hooks, and no others of an outer pass, within the context.

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
    """A hook point that also runs the hooks that a pass of the current thread attaches; see `StreamState.attach`."""

    streams: StreamState

    def __call__(self, x: Tensor) -> Any:
        """The value after the hooks that write, the user's, and those that read."""
        own = self.streams.of_thread.pass_hooks
        if own is None:
            return HookPoint.__call__(self, x)
        x = _apply(own.before.get(id(self), ()), x)
        if not own.silent:
            x = HookPoint.__call__(self, x)
        return _apply(own.after.get(id(self), ()), x)


def _apply(functions: Sequence[Callable[[Tensor], Tensor | None]], x: Tensor) -> Tensor:
    for function in functions:
        written = function(x)
        x = x if written is None else written
    return x


def running_traces(model: nn.Module) -> list[Any]:
    """Returns the traces of nnsight that currently follow the model.

    nnsight 0.8 lists them at every module that it wraps, as `__nnsight__`. A trace has one request for each value and
    serves it at the first visit of the module, which in `ablated()` would be that of the clean pass.

    Raises:
        ValueError: another version of nnsight, whose traces cannot be kept from the clean pass.
    """
    state = model.__dict__.get("__nnsight__")
    try:
        traces = [] if state is None else [reference() for reference, *_ in state.routes]
        return [trace for trace in traces if trace is not None and trace.interleaving]
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "this version of nnsight records its traces in an unknown way, so that they would show values of the clean "
            "pass in the ablated stream: install nnsight>=0.8,<0.9"
        ) from error


@contextmanager
def pause_traces(model: nn.Module) -> Iterator[None]:
    """Hides what the model computes from traces of nnsight, like from silent user hooks, within the context."""
    traces = running_traces(model)
    for trace in traces:
        trace.interleaving = False
    try:
        yield
    finally:
        for trace in traces:
            trace.interleaving = True


@contextmanager
def user_hooks(
    model: HookedRootModule,
    streams: StreamState,
    hooks: Sequence[tuple[Any, Any, Literal["fwd", "bwd"]]],
    *,
    remove: bool,
) -> Iterator[None]:
    """Attaches hooks of the user that fire only in passes of this thread, within the context.

    Args:
        hooks: (name or filter of names, function, direction), as TransformerLens takes them.
        remove: whether they are taken away at the end; otherwise they stay, for all threads.
    """
    owner = threading.get_ident()
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
