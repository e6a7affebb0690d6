"""Evaluation of an SAE by SAELens, on blocks of a token file and in either stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream, check_whole
from sa_lens.core.host import Hook, Host, at_least_float32, device_of, in_stream
from sa_lens.data.blocks import Text
from sa_lens.sae.hook_activations import hook_width, import_sae_lens, text_of
from sa_lens.sae.train import FINISHED, load_sae, newest_checkpoint

BLOCKS_AT_ONCE, LOGITS_AT_ONCE = 8, 2**25
"""Largest number of blocks in one pass, and of logits in each of the three sets that are in memory at a time."""


@dataclass(frozen=True, eq=False)
class SAEEvaluation:
    """Measures of one SAE on one text, from `evaluate_sae`; losses are mean nats per predicted token."""

    hook: str
    """Hook point."""
    stream: Stream
    """Stream of the activations and of the losses."""
    n_tokens: int
    """Number of tokens of the text, with ignored ones."""
    n_latents: int
    """Number of latents of the SAE."""
    l0: float
    """Mean number of latents per token that are not 0."""
    l1: float
    """Mean sum of the absolute values of the latents per token."""
    ce: float
    """Loss of the unchanged model."""
    ce_sae: float
    """Loss with the hook replaced by the reconstruction of the SAE."""
    ce_zero: float
    """Loss with the hook set to 0 at every token."""
    ce_score: float
    """(`ce_zero` - `ce_sae`) / (`ce_zero` - `ce`): 1 if the loss is that of the model, 0 if it is that with zeros."""
    explained_variance: float
    """1 - mean squared error over the variance of the activations, both summed over dimensions."""
    mse: float
    """Mean squared error, summed over dimensions."""
    cosine: float
    """Mean cosine similarity of activation and reconstruction."""
    dead_latents: int
    """Number of latents that never fire on this text."""
    density: Float[np.ndarray, " latent"]
    """Share of the tokens on which each latent fires."""


def evaluate_sae(
    model: Host,
    sae: Any,
    tokens: Text,
    *,
    hook: str | None = None,
    stream: Stream | None = None,
    n_tokens: int = 100_000,
    ignore: Collection[int] = (),
    scaler: Any = None,
    progress: bool = True,
) -> SAEEvaluation:
    """Evaluates an SAE with SAELens's `run_evals`: its reconstruction, sparsity, and the model's loss with it.

    In the ablated stream the hook is replaced or zeroed at all positions of the ablated pass; the clean pass, from
    which keys, values and masks come, is unchanged. All measures are computed in float32 or wider.

    Args:
        model: any `HookedTransformer`.
        sae: an SAE of SAELens, or its folder, or a checkpoint folder of sa_lens or SAELens.
        tokens: a token file, its path, or blocks `[batch pos]`; use text on which the SAE was not trained.
        hook: hook point; None takes it from the metadata of the SAE.
        stream: clean or ablated; None takes it from the metadata of the SAE, or clean if they name none.
        n_tokens: largest number of tokens, in whole blocks from the beginning of the text; at least one block is read.
        ignore: tokens, such as begin-of-text, whose activations are neither replaced nor counted.
        scaler: SAELens's `ActivationScaler` for an SAE whose scale is not folded into its weights; None loads the one
            in the folder of the SAE. `ActivationScaler()` evaluates such an SAE without a scale.
        progress: whether to show progress bars.

    Raises:
        ImportError: SAELens is not installed.
        FileNotFoundError: the token file or the SAE does not exist.
        ValueError: an unknown hook or stream, an SAE of another width, a text that is too short or ignored as a whole,
            a hook without effect on the loss (the CE score is then 0 / 0), or an SAE that was trained on scaled
            activations whose scale is neither in its weights nor given.

    Source: SAELens, `run_evals`. Differs: special tokens count unless they are ignored, as in our losses, and no
    begin-of-text token is added, since our models are trained without it.
    """
    sae_lens = import_sae_lens()
    from sae_lens.evals import EvalConfig

    check_whole("n_tokens", n_tokens, 1)
    if isinstance(sae, (str, Path)):
        scaler = scaler or _scaler_beside(Path(sae))
        sae = load_sae(Path(sae), model)
    scaler = _scaler_of(sae, scaler)
    if sae.dtype not in (torch.float32, torch.float64):
        sae = copy.deepcopy(sae).to(torch.float32)
    hook = hook or sae.cfg.metadata.hook_name
    if hook is None:
        raise ValueError("the SAE's metadata names no hook: give hook=")
    chosen: Stream = stream or sae.cfg.metadata.stream or "clean"
    width = hook_width(model, hook, chosen)
    if sae.cfg.metadata.hook_head_index is None and sae.cfg.d_in != width:
        raise ValueError(f"the SAE reads {sae.cfg.d_in} dimensions, but {hook!r} holds {width}")
    blocks = text_of(tokens, model)
    text = blocks.rows(0, max(1, n_tokens // blocks.length))
    if ignore and bool(np.isin(text.cpu().numpy(), list(ignore)).all()):
        raise ValueError("every token of the text is ignored")
    batch = max(1, min(BLOCKS_AT_ONCE, LOGITS_AT_ONCE // (blocks.length * model.cfg.d_vocab)))
    passes = math.ceil(len(text) / batch)
    with in_stream(model, chosen), _set_hook_name(sae, hook):
        try:
            metrics, latents = sae_lens.run_evals(
                sae=sae,
                activation_store=_TokenStore(text.to(device_of(model)), batch),
                model=_WideModel(model),
                activation_scaler=scaler,
                eval_config=EvalConfig(
                    batch_size_prompts=batch,
                    n_eval_reconstruction_batches=passes,
                    n_eval_sparsity_variance_batches=passes,
                    compute_ce_loss=True,
                    compute_sparsity_metrics=True,
                    compute_variance_metrics=True,
                    compute_featurewise_density_statistics=True,
                ),
                exclude_special_tokens=list(ignore),
                verbose=progress,
            )
        except ZeroDivisionError as error:
            raise ValueError(
                f"zeroing {hook!r} does not change the loss of the {chosen} stream, so the CE score is 0 / 0; choose a "
                "hook that the loss depends on"
            ) from error
    preserved, quality = metrics["model_performance_preservation"], metrics["reconstruction_quality"]
    density = np.asarray(latents["feature_density"])
    return SAEEvaluation(
        hook=hook,
        stream=chosen,
        n_tokens=text.numel(),
        n_latents=sae.cfg.d_sae,
        l0=metrics["sparsity"]["l0"],
        l1=metrics["sparsity"]["l1"],
        ce=preserved["ce_loss_without_sae"],
        ce_sae=preserved["ce_loss_with_sae"],
        ce_zero=preserved["ce_loss_with_ablation"],
        ce_score=preserved["ce_loss_score"],
        explained_variance=quality["explained_variance"],
        mse=quality["mse"],
        cosine=quality["cossim"],
        dead_latents=int((density == 0).sum()),
        density=density,
    )


def _scaler_beside(folder: Path) -> Any:
    """Returns the scaler in the folder of an SAE, or None without one or if it does not scale.

    Raises:
        FileNotFoundError: the folder holds no SAE.
    """
    from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
    from sae_lens.training.activation_scaler import ActivationScaler

    if not (folder / FINISHED).is_file():
        checkpoint = newest_checkpoint(folder)
        instead = (
            f"; continue its training with resume=True, or evaluate the checkpoint {checkpoint}" if checkpoint else ""
        )
        raise FileNotFoundError(f"{folder} holds no SAE (no {FINISHED}){instead}")
    scaler = ActivationScaler()
    if (folder / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
    return None if scaler == ActivationScaler() else scaler


def _scaler_of(sae: Any, scaler: Any) -> Any:
    """Returns the given scaler, or one without effect for an SAE that needs none.

    Raises:
        ValueError: the SAE reads scaled activations, but the scale is unknown.
    """
    from sae_lens.training.activation_scaler import ActivationScaler

    how = sae.cfg.normalize_activations
    if scaler is None and how in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"this SAE was trained with normalize_activations={how!r}, and the scale is not folded into its weights: "
            "give scaler=, an ActivationScaler of SAELens with that scale, or the folder of its checkpoint as the SAE"
        )
    return ActivationScaler() if scaler is None else scaler


class _WideModel:
    """A model with the calls that SAELens's evaluation makes; hooks, logits and losses are in float32 or wider."""

    def __init__(self, model: Host) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    def __call__(self, tokens: Int[Tensor, "batch pos"], **options: Any) -> tuple[Tensor, Tensor]:
        return self.run_with_hooks(tokens, fwd_hooks=[], **options)

    def run_with_hooks(
        self, tokens: Int[Tensor, "batch pos"], *, fwd_hooks: Sequence[Hook], return_type: str, loss_per_token: bool
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "batch pred"]]:
        hooks = [(name, self._widen(function)) for name, function in fwd_hooks]
        logits = at_least_float32(self.model.run_with_hooks(tokens, fwd_hooks=hooks) if hooks else self.model(tokens))
        log_p = logits.log_softmax(-1)[:, :-1]
        return logits, -log_p.gather(-1, tokens[:, 1:, None])[..., 0]

    def run_with_cache(self, tokens: Int[Tensor, "batch pos"], **options: Any) -> tuple[Any, dict[str, Tensor]]:
        out, cache = self.model.run_with_cache(tokens, **options)
        return out, {name: at_least_float32(x) for name, x in cache.items()}

    @staticmethod
    def _widen(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def edit(x: Tensor, hook: Any) -> Tensor | None:
            edited = function(at_least_float32(x), hook)
            return None if edited is None else edited.to(x.dtype)

        return edit


class _TokenStore:
    """The store that SAELens's evaluation reads tokens from, batch by batch."""

    def __init__(self, blocks: Int[Tensor, "batch pos"], batch: int) -> None:
        self.blocks = blocks
        self.context_size = blocks.shape[1]
        self.store_batch_size_prompts = batch
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.next = 0

    def get_batch_tokens(self, batch: int) -> Int[Tensor, "batch pos"]:
        first, self.next = self.next, self.next + batch
        return self.blocks[first : self.next]


@contextmanager
def _set_hook_name(sae: Any, hook: str) -> Iterator[None]:
    """Sets the hook in the metadata of the SAE within the context."""
    metadata = sae.cfg.metadata
    before = metadata.hook_name
    metadata.hook_name = hook
    try:
        yield
    finally:
        metadata.hook_name = before
