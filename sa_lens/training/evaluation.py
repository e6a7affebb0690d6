"""Evaluation: losses of both streams on a fixed validation text, and how the gates use their units."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sa_lens.config import Stream, Which
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss
from sa_lens.core.fused import fused_losses_and_masks, reads_fused
from sa_lens.core.gate import Gate
from sa_lens.core.loss_terms import cross_entropy
from sa_lens.data import TokenFile, validation_blocks
from sa_lens.data.cache import cache_folder
from sa_lens.data.preparation import print_form
from sa_lens.data.sources import open_source
from sa_lens.data.tokens import write_tokens
from sa_lens.data.whole_files import scratch_folder
from sa_lens.training.trained_run import load_run, settings_of, text_of_run

TOKENS_AT_ONCE = 4096
"""Tokens of a batch."""

LOGITS_AT_ONCE = 2**25
"""Largest number of logits of one stream that the hooked path holds in memory (float32: 128 MiB)."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation; those of the ablated stream are None without gates, or if it was left out."""

    tokens: int
    """Predicted tokens."""
    clean_loss: float
    """Cross-entropy of the clean stream, mean nats per predicted token, end-of-text targets included."""
    clean_perplexity: float
    """exp(clean_loss)."""
    clean_bits_per_byte: float
    """clean_loss in bits per byte of text, by the bytes per token of the whole validation file."""
    ablated_loss: float | None = None
    """Cross-entropy of the ablated stream, mean nats per predicted token."""
    ablated_perplexity: float | None = None
    """exp(ablated_loss)."""
    ablated_bits_per_byte: float | None = None
    """ablated_loss in bits per byte of text."""
    units_used: float | None = None
    """Share of all units that stay at least once in the text."""
    attn_units_used: float | None = None
    """The same of attention units alone."""
    mlp_units_used: float | None = None
    """The same of neurons alone; None in an attention-only model."""
    mask_overlap: float | None = None
    """Share of a token's kept units that the next token keeps too; mean over tokens, layers and both kinds of unit."""


def evaluate(
    model: SelfAblatingTransformer,
    blocks: Int64[np.ndarray, "batch pos_and_next"],
    *,
    bytes_per_token: float,
    clean_alone: bool = False,
    share: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Evaluation:
    """Evaluates both streams in float32, by the fused path if it covers the model and no hooks are attached.

    A mask entry counts as kept above one half, which is exact for hard gates.

    Args:
        blocks: validation text; position t of a block predicts position t + 1.
        bytes_per_token: bytes of text per token, for bits per byte.
        clean_alone: leave the ablated stream out, as while it is not trained yet.
        share: (rank, processes): this process evaluates the blocks rank, rank + processes, rank + 2 processes, ...
        total: sums a tensor over all processes.
    """
    rank, processes = share
    n_ctx = blocks.shape[1] - 1
    fused = reads_fused(model)
    at_once = TOKENS_AT_ONCE if fused else min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.cfg.d_vocab)
    device = model.W_E.device
    losses, overlaps = _Sum(), _Sum()
    ablated_losses = _Sum()
    kept = {"attn": _unit_counts(model, "attn_gate"), "mlp": _unit_counts(model, "mlp_gate")}
    mine = torch.from_numpy(blocks[rank::processes]).to(device)
    with torch.no_grad():
        for batch in mine.split(max(1, at_once // n_ctx)):
            if len(batch) == 0:
                continue
            clean_loss, ablated_loss, masks = _losses_and_masks(model, batch[:, :-1], batch[:, 1:], fused, clean_alone)
            losses.add(clean_loss, len(batch))
            if ablated_loss is None:
                continue
            ablated_losses.add(ablated_loss, len(batch))
            for kind, counts in kept.items():
                for layer, mask in enumerate(masks[f"{kind}_gate"]):
                    flat = mask.flatten(2).float()
                    counts[layer] += (flat > 0.5).sum((0, 1))
                    if n_ctx > 1:
                        both_keep = torch.minimum(flat[:, :-1], flat[:, 1:]).sum(-1) / flat[:, :-1].sum(-1)
                        overlaps.add(both_keep.mean(), len(batch))
    bits = 1 / math.log(2) / bytes_per_token
    figures: dict[str, Any] = _loss_figures("clean", losses.mean(total), bits)
    if model.gates.gated and not clean_alone:
        used = {kind: torch.cat([total(c) for c in counts]) > 0 for kind, counts in kept.items() if counts}
        figures |= _loss_figures("ablated", ablated_losses.mean(total), bits)
        figures |= {f"{kind}_units_used": _share(units) for kind, units in used.items()}
        figures["units_used"] = _share(torch.cat(list(used.values())))
        figures["mask_overlap"] = overlaps.mean(total) if n_ctx > 1 else None
    return Evaluation(tokens=blocks.shape[0] * n_ctx, **figures)


def _loss_figures(stream: Stream, loss: float, bits: float) -> dict[str, float]:
    """Returns a loss in its three forms; `bits` is the bits per byte of one nat per token."""
    # 1e304 where exp(loss) would overflow: files hold finite numbers alone
    perplexity = math.exp(min(loss, 700.0))
    return {f"{stream}_loss": loss, f"{stream}_perplexity": perplexity, f"{stream}_bits_per_byte": loss * bits}


def _losses_and_masks(
    model: SelfAblatingTransformer,
    tokens: Int64[Tensor, "batch pos"],
    targets: Int64[Tensor, "batch pos"],
    fused: bool,
    clean_alone: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None, dict[str, list[Tensor]]]:
    """Returns clean loss, ablated loss (None if it is left out) and masks of a batch, by kind of gate and layer."""
    if clean_alone or (fused and not model.gates.gated):
        loss = TwoStreamLoss(model, path="fused" if fused else "hooked", dtype=model.cfg.dtype)
        return loss(tokens, targets, clean_alone=True).clean, None, {}
    if fused:
        losses, read = fused_losses_and_masks(model, tokens, targets)
        masks = {
            f"{kind}_gate": [read[place] for place in sorted(read) if place[1] == kind] for kind in ("attn", "mlp")
        }
        return losses.clean, losses.ablated, masks
    both = model.run_both_passes(tokens)
    clean = cross_entropy(both.clean_logits, tokens, targets)
    if both.ablated_logits is None:
        return clean, None, {}
    return clean, cross_entropy(both.ablated_logits, tokens, targets), both.masks


class _Sum:
    """A weighted sum on the CPU, with its weight."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, value: Float[Tensor, ""], weight: int) -> None:
        self.sums += torch.tensor([float(value) * weight, weight], dtype=torch.float64)

    def mean(self, total: Callable[[Tensor], Tensor]) -> float:
        value, weight = total(self.sums).tolist()
        return value / weight


def _unit_counts(model: SelfAblatingTransformer, gate_name: str) -> list[Int64[Tensor, " unit"]]:
    """Makes a counter of kept tokens for every unit, one tensor per layer."""
    gates = [(n, m) for n, m in model.named_modules() if isinstance(m, Gate) and n.endswith(gate_name)]
    return [torch.zeros(gate.n_units, dtype=torch.int64, device=model.W_E.device) for _, gate in gates]


def _share(used: Bool[Tensor, " unit"]) -> float:
    return float(used.double().mean())


def bytes_per_token(file: TokenFile) -> float:
    """Returns the bytes of text per token of a file; end-of-text tokens count as tokens without bytes."""
    return file.n_bytes / file.n_tokens


def evaluate_run(
    run: str,
    *,
    text: str | None = None,
    column: str = "text",
    tokens: int = 100_000,
    which: Which = "best",
    device: str = "auto",
) -> Evaluation:
    """Evaluates a trained model on its run's validation text, or on another one.

    Args:
        run: run folder, shipped name or Hub id.
        text: path or dataset id, as `data.source`; None: the run's own validation text.
        column: column of `text` that holds the text.
        tokens: predicted tokens, from the beginning of the text.

    Raises:
        ValueError, FileNotFoundError: no such model or text, or a model that was not saved by a training run.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    model = load_run(run, which=which, device=device)
    if model.tokenizer is None:
        raise ValueError(f"{run} has no tokenizer, so it cannot read text")
    settings = settings_of(run)
    n_ctx = model.cfg.n_ctx if settings is None else min(settings.model.n_ctx, model.cfg.n_ctx)
    if text is None:
        return _evaluate_file(model, text_of_run(run, model).validation, n_ctx, tokens)
    cache = cache_folder(None)
    source = open_source(text, column=column, cache=cache)
    with scratch_folder(cache / "tokens") as folder:
        form = source.form()
        file = write_tokens(folder / "text.bin", source.read(), model.tokenizer, name=text, form=form)
        print_form(text, [file])
        return _evaluate_file(model, file, n_ctx, tokens)


def _evaluate_file(model: SelfAblatingTransformer, file: TokenFile, n_ctx: int, tokens: int) -> Evaluation:
    file.check_vocabulary(model.cfg.d_vocab)
    blocks = validation_blocks(file, n_ctx, tokens)
    return evaluate(model, blocks, bytes_per_token=bytes_per_token(file))
