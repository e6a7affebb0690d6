"""Model folders are the same under TransformerLens 3 and 4: each version reads and writes what the other wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import gated_model, random_tokens

import sa_lens as sa

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", [3, 4])
@torch.no_grad()
def test_a_folder_loads_under_every_version_and_is_written_again_as_it_was(version: int, tmp_path: Path) -> None:
    # gated_model("llama", "both").save_pretrained(...) with TransformerLens 3.9.0 and 4.3.0
    folder = GOLDEN / f"saved-with-transformerlens-{version}"
    model = sa.SelfAblatingTransformer.from_pretrained(folder, device="cpu")
    made = gated_model("llama", "both")
    weights = dict(made.named_parameters())
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    tokens = random_tokens()
    assert torch.equal(model(tokens), made(tokens))
    with model.ablated(), made.ablated():
        assert torch.equal(model(tokens), made(tokens))
    again = model.save_pretrained(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
