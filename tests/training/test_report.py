"""The text of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import sa_lens as sa
from sa_lens.data.stories import generate
from sa_lens.training import train
from sa_lens.training.report import load_run, text_of_run


def test_a_text_that_changed_is_read_with_the_runs_tokenizer(tmp_path: Path) -> None:
    """A tokenizer trained on the text of today would give tokens that the model takes for other words."""
    text = tmp_path / "text.jsonl"

    def write(stories: list[str]) -> None:
        text.write_text("\n".join(json.dumps({"text": story}) for story in stories), encoding="utf-8")

    write([story.text for story in generate(60, 1)])
    run = sa.RunConfig(
        model=sa.ModelConfig(n_layers=1, d_model=16, n_heads=2, n_ctx=16),
        gates=sa.GateConfig(k_attn=4, k_mlp=8),
        data=sa.DataConfig(
            source=str(text), vocab_size=400, validation_fraction=0.2, cache_dir=str(tmp_path / "cache")
        ),
        train=sa.TrainConfig(steps=1, batch_size=2, eval_tokens=64, sample_tokens=0),
    )
    folder = tmp_path / "run"
    train(run, folder, device="cpu", progress=False)
    model = load_run(str(folder), device="cpu")
    assert model.tokenizer is not None
    same = text_of_run(str(folder), model)
    assert same.tokenizer.get_vocab() == model.tokenizer.get_vocab()

    write([f"{i} zebras quarrel over xylophones while quick jackals doze. " * 4 for i in range(30)])
    found = text_of_run(str(folder), model)
    read = model.tokenizer.decode(found.train.tokens[:40].tolist())
    assert "zebras quarrel over xylophones" in read
    assert found.train.tokens.max() < model.cfg.d_vocab
