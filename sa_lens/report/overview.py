"""What a model is, how well its streams predict, and text that they write."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from sa_lens.data import validation_blocks
from sa_lens.report.contents import Fact, Overview, Sample
from sa_lens.report.measured_text import ModelText, Texts
from sa_lens.report.model_tables import STREAMS, format_cell
from sa_lens.report.subjects import Subject
from sa_lens.training import Evaluation, bytes_per_token, evaluate, sample
from sa_lens.views import training_curves
from sa_lens.views.records import Curves, Table

EVALUATED = 100_000
"""Predicted tokens that losses are the means of, at most."""
PROMPT_WORDS = 4
"""Words of a story that begin a sample."""
SAMPLE_TOKENS = 60
"""Tokens of a sample."""


def measure_losses(subject: Subject, text: ModelText) -> Evaluation:
    """Measures the losses of both streams, and how the gates use their units."""
    blocks = validation_blocks(text.held_out, subject.n_ctx, EVALUATED)
    return evaluate(subject.model, blocks, bytes_per_token=bytes_per_token(text.held_out))


def overview(subject: Subject, texts: Texts, evaluation: Evaluation, n_samples: int, seed: int) -> Overview:
    """Returns the first page of a model.

    Args:
        evaluation: from `measure_losses`.
        n_samples: prompts that each stream continues.
        seed: of the samples.
    """
    return Overview(
        facts=(*_shape(subject), *_training(subject), *_use(evaluation, texts)),
        losses=losses(evaluation),
        samples=tuple(_samples(subject, texts.stories, n_samples, seed)),
    )


def _shape(subject: Subject) -> list[Fact]:
    cfg = subject.model.cfg
    neurons = "no MLP" if cfg.attn_only else f"{cfg.d_mlp:,} neurons"
    return [
        Fact("Transformer", f"{_count(cfg.n_layers, 'layer')} of {_count(cfg.n_heads, 'head')} and {neurons}", ""),
        Fact("Width", f"{cfg.d_model:,}, {cfg.d_head:,} per head", "Size of the residual stream, channels of a head."),
        Fact("Parameters", f"{subject.parameters:,}", "Gates included."),
        Fact("Context", f"{cfg.n_ctx:,} tokens", "Tokens that it reads at a time."),
        Fact("Vocabulary", f"{cfg.d_vocab:,} tokens", ""),
        _gates(subject),
    ]


def _gates(subject: Subject) -> Fact:
    gates, cfg = subject.model.gates, subject.model.cfg
    if not gates.gated:
        return Fact("Gates", "none", "A plain transformer: it has only the clean stream.")
    units = f"{gates.k_attn} of {cfg.n_heads} heads"
    if gates.attn_unit == "channel":
        units = f"{gates.k_attn} of {cfg.n_heads * cfg.d_head:,} attention units"
    if not cfg.attn_only:
        units += f" and {gates.k_mlp} of {cfg.d_mlp:,} neurons"
    read = {
        "local": f"each layer's own input in the {'ablated' if gates.reads_ablated else 'clean'} stream",
        "global": "the end of a clean pass",
        "both": "each layer's own input in the clean stream and the end of a clean pass",
    }[gates.scope]
    how = "" if gates.learned else f" Control: scores are {gates.scores}, not learned."
    if gates.rank is not None:
        how += f" Their matrices have rank {gates.rank}."
    stay = "stay" if gates.kind == "hard" else "stay in part, by soft weights,"
    return Fact(
        "Gates",
        f"{gates.scope}, {gates.kind}: {units}",
        f"This many units {stay} at each token and layer of the ablated stream; the gates read {read}.{how}",
    )


def _training(subject: Subject) -> list[Fact]:
    run = subject.settings
    if run is None:
        return []
    train, data = run.train, run.data
    batch = train.batch_size * train.accumulate
    text = f"{data.n_stories:,} generated stories" if data.source == "stories" else data.source
    facts = [
        Fact("Trained on", text, ""),
        Fact(
            "Training",
            f"{train.steps:,} steps of {batch:,} x {run.model.n_ctx:,} tokens",
            f"Learning rate {train.lr:g}, seed {train.seed}; {train.steps * batch * run.model.n_ctx / 1e6:,.1f} "
            "million tokens for each of the processes that trained it.",
        ),
    ]
    if run.gates.gated:
        loss = run.loss
        facts.append(
            Fact(
                "Loss",
                f"{loss.clean:g} clean + {loss.ablated:g} ablated + {loss.reconstruction:g} reconstruction",
                "Coefficients of the cross-entropy of each stream and of the distance between them.",
            )
        )
    if train.init is not None:
        facts.append(Fact("Started from", train.init, "Weights before training."))
    return facts


def _use(evaluation: Evaluation, texts: Texts) -> list[Fact]:
    facts = [Fact("Measured on", f"{evaluation.tokens:,} tokens", f"Losses and use of units: {texts.name}.")]
    for name, share, meaning in (
        ("Attention units used", evaluation.attn_units_used, "Kept at one or more tokens of that text."),
        ("Neurons used", evaluation.mlp_units_used, "Kept at one or more tokens of that text."),
        (
            "Mask overlap",
            evaluation.mask_overlap,
            "Share of the units kept at a token that are kept at the next one too.",
        ),
    ):
        if share is not None:
            facts.append(Fact(name, f"{share:.1%}", meaning))
    return facts


def losses(evaluation: Evaluation) -> Table:
    """Returns a table with one row per stream."""
    columns = ("stream", "loss, nats per token", "perplexity", "bits per byte", "cost of the gates, nats")
    cells = loss_cells(evaluation)
    rows = []
    for stream in STREAMS[: 1 if evaluation.ablated_loss is None else 2]:
        row = [cells[f"{stream} {name}"] for name in ("loss, nats per token", "perplexity", "bits per byte")]
        rows.append((stream, *row, cells[columns[-1]] if stream == "ablated" else ""))
    note = f"means over {evaluation.tokens:,} predicted tokens of held-out text"
    return Table("Losses", note, columns, tuple(rows), (False, True, True, True, True))


def loss_cells(evaluation: Evaluation) -> dict[str, str]:
    """Returns the model's cells in the table that compares losses."""
    cost = None if evaluation.ablated_loss is None else evaluation.ablated_loss - evaluation.clean_loss
    return {
        "clean loss, nats per token": format_cell(evaluation.clean_loss, ".4f"),
        "ablated loss, nats per token": format_cell(evaluation.ablated_loss, ".4f"),
        "cost of the gates, nats": format_cell(cost, "+.4f"),
        "clean perplexity": format_cell(evaluation.clean_perplexity, ",.2f"),
        "ablated perplexity": format_cell(evaluation.ablated_perplexity, ",.2f"),
        "clean bits per byte": format_cell(evaluation.clean_bits_per_byte, ".4f"),
        "ablated bits per byte": format_cell(evaluation.ablated_bits_per_byte, ".4f"),
        "attention units used": format_cell(evaluation.attn_units_used, ".1%"),
        "neurons used": format_cell(evaluation.mlp_units_used, ".1%"),
        "kept units that the next token keeps too": format_cell(evaluation.mask_overlap, ".1%"),
    }


def training_of(subjects: Sequence[Subject]) -> Curves | None:
    """Returns the training curves of the runs that kept them, in one chart; None if none did."""
    curves = []
    for subject in subjects:
        with suppress(FileNotFoundError, ValueError):
            curves.append(training_curves({subject.name: subject.run}))
    lines = tuple(line for of_run in curves for line in of_run.lines)
    moments = tuple(dict.fromkeys(moment for of_run in curves for moment in of_run.moments))
    return replace(curves[0], lines=lines, moments=moments) if curves else None


def _samples(subject: Subject, stories: Sequence[str], n_samples: int, seed: int) -> list[Sample]:
    """Returns what each stream writes: a text from its beginning, and two stories after their first words."""
    prompts = ["", *dict.fromkeys(" ".join(story.split()[:PROMPT_WORDS]) for story in stories)][:n_samples]
    room = subject.model.cfg.n_ctx - 1
    samples = []
    for prompt in prompts:
        if len(subject.tokenizer.encode(prompt, add_special_tokens=False)) >= room:
            continue
        drawn = sample(subject.model, prompt, max_new_tokens=SAMPLE_TOKENS, seed=seed)
        for stream, text in (("clean", drawn.clean), ("ablated", drawn.ablated)):
            if text is not None:
                samples.append(Sample(prompt, stream, text.removeprefix(prompt)))
    return samples


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"
