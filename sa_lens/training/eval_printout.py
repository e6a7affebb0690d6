"""The printed table of `sa-lens eval`."""

from __future__ import annotations

from sa_lens.training.evaluation import Evaluation


def evaluation_table(evaluation: Evaluation) -> str:
    """Formats the figures of an evaluation as a table of text for `sa-lens eval`."""
    rows = [f"{evaluation.tokens:,} tokens", f"{'':<14}{'loss':>10}{'perplexity':>13}{'bits per byte':>16}"]
    for stream in ("clean", "ablated"):
        loss = getattr(evaluation, f"{stream}_loss")
        if loss is not None:
            perplexity, bits = (
                getattr(evaluation, f"{stream}_perplexity"),
                getattr(evaluation, f"{stream}_bits_per_byte"),
            )
            rows.append(f"{stream:<14}{loss:>10.4f}{perplexity:>13.2f}{bits:>16.4f}")
    for name, label in (
        ("attn_units_used", "attention units used at least once"),
        ("mlp_units_used", "neurons used at least once"),
        ("mask_overlap", "kept units that the next token keeps too"),
    ):
        value = getattr(evaluation, name)
        if value is not None:
            rows.append(f"{label:<42}{value:>11.1%}")
    return "\n".join(rows)
