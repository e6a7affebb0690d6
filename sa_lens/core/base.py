"""The class under the gates: TransformerLens's `HookedTransformer` if it has one, else sa_lens's own decoder.

TransformerLens 4 removed `HookedTransformer`. Everything else in `core` imports the class, its configuration and its
parts from here, and so runs on both versions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# by version: on 4, asking for a removed name raises ImportError, in hasattr too
TRANSFORMER_LENS = int(version("transformer-lens").split(".")[0])
"""Major version of the installed TransformerLens."""

if TYPE_CHECKING or TRANSFORMER_LENS < 4:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components import Embed, Unembed
else:
    from sa_lens.core.decoder import Embed, HookedTransformer, HookedTransformerConfig, Unembed

__all__ = [
    "TRANSFORMER_LENS",
    "Embed",
    "HookedTransformer",
    "HookedTransformerConfig",
    "Unembed",
    "hooked_transformer",
    "ignore_deprecation",
    "official_name",
]


@contextmanager
def ignore_deprecation() -> Iterator[None]:
    """Suppresses TransformerLens 3's warning that `HookedTransformer` will be removed, within the context."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        yield


def hooked_transformer(cfg: HookedTransformerConfig, **arguments: Any) -> HookedTransformer:
    """Makes a plain `HookedTransformer` without gates."""
    with ignore_deprecation():
        return HookedTransformer(cfg, **arguments)


def official_name(name: str) -> str | None:
    """Returns the Hub id of a model that TransformerLens knows by this name, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = "loading_from_pretrained" if TRANSFORMER_LENS < 4 else "supported_models"
        try:
            return import_module(f"transformer_lens.{home}").get_official_model_name(name)
        except ValueError:
            return None
