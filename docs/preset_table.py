"""The table of presets in `docs/method.md`, made from the presets: `python docs/preset_table.py` prints it."""

from __future__ import annotations

from sa_lens.config import PRESETS, RunConfig


def row(name: str, run: RunConfig) -> str:
    """One preset as a row of the table."""
    model, gates, loss, train = run.model, run.gates, run.loss, run.train
    shape = [
        f"{model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads",
        f"d_mlp {model.d_mlp or 4 * model.d_model}",
        f"{model.n_ctx} positions",
        "attention scale" if model.attn_scale else "no attention scale",
        "tied embedding" if model.tied_embedding else "untied embedding",
        f"tokenizer `{run.data.tokenizer}`" + (f" of {run.data.vocab_size:,}" if run.data.tokenizer == "bpe" else ""),
    ]
    k = f"k {gates.k_attn}" if gates.k_attn == gates.k_mlp else f"k {gates.k_attn} and {gates.k_mlp}"
    rate = f"lr {train.lr:g}"
    if train.dense_steps:
        dense_lr = train.dense_lr if train.dense_lr is not None else train.lr
        rate = f"the clean stream alone for {train.dense_steps:,} (lr {dense_lr:g}), then both (lr {train.lr:g})"
    steps = [
        f"{train.steps:,} steps of {train.batch_size} x {model.n_ctx} tokens",
        rate,
        f"loss {loss.clean:g} / {loss.ablated:g} / {loss.reconstruction:g}",
    ]
    gate = f"{gates.kind} {gates.scope}, {k}, T {gates.temperature:g}"
    return f"| `{name}` | {', '.join(shape)} | {gate} | {', '.join(steps)} |"


def preset_table() -> str:
    """The whole table."""
    rows = ["| | model | gates | training |", "|---|---|---|---|", *(row(name, run) for name, run in PRESETS.items())]
    return "\n".join(rows)


if __name__ == "__main__":
    print(preset_table())
