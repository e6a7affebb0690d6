"""Records hold the patterns and values of both streams; their page needs no network."""

import re

import numpy as np
import pytest
import torch
from characters import TOKENS, caches

from sa_lens.views import attention, draw, save, unit_activations
from sa_lens.views.records import from_json, to_json


def test_patterns_of_both_streams(model):
    tokens = torch.tensor([0, 5, 6, 7, 6])
    record = attention(model, tokens, 1)
    assert record.heads == ("clean 1.0", "clean 1.1", "ablated 1.0", "ablated 1.1")
    assert record.tokens == ("0", "5", "6", "7", "6")
    _, clean = model.run_with_cache(tokens[None])
    with model.ablated():
        _, ablated = model.run_with_cache(tokens[None])
    expected = torch.cat([clean["pattern", 1][0], ablated["pattern", 1][0]])
    np.testing.assert_allclose(np.array(record.patterns), expected, atol=1e-6)
    assert not np.allclose(record.patterns[0], record.patterns[2])
    assert attention(model.to_hooked_transformer(), tokens, 1).patterns == record.patterns[:2]
    assert attention(model, tokens[None], 1, stream="ablated").heads == record.heads[2:]


def test_page_needs_no_network(model, tmp_path):
    path = save(attention(model, torch.tensor([0, 5, 6]), 0), tmp_path / "attention.html")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert not re.search(r"import[^;]{0,80}https?://", text)
    assert "ablated 0.1" in text
    # the script once, not once a stream
    assert text.count("AttentionHeads") < 2 * draw(attention(model, torch.tensor([0]), 0, stream="clean")).html().count(
        "AttentionHeads"
    )
    with pytest.raises(ValueError, match=r"saved as \.html"):
        save(attention(model, torch.tensor([0]), 0), tmp_path / "attention.png")


@pytest.mark.parametrize("site", ["mlp", "attn"])
def test_unit_activations(model, plain_model, site):
    record = unit_activations(model, TOKENS, site=site, most=3)
    assert record.streams == ("clean", "ablated")
    found = caches(model)
    for layer in range(2):
        values = {s: (found[s]["post" if site == "mlp" else "z", layer])[0].flatten(1) for s in record.streams}
        largest = values["clean"].abs().amax(0).topk(3).indices
        shown = torch.tensor(record.values)[:, :, 3 * layer : 3 * layer + 3]
        torch.testing.assert_close(
            shown, torch.stack([values[s][:, largest] for s in record.streams], 1), rtol=1e-5, atol=1e-6
        )
        first = int(largest[0])
        assert record.units[3 * layer] == f"L{layer}.{site}.{first}"
    assert from_json(to_json(record)) == record
    assert draw(record).html().count("data-sa-lens-library=") == 1
    assert unit_activations(plain_model, TOKENS, site=site).streams == ("clean",)


def test_refusals(model):
    with pytest.raises(ValueError, match="layer 2 is not there"):
        attention(model, torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="no tokenizer"):
        attention(model, "Once", 0)
    with pytest.raises(ValueError, match="not of 2"):
        attention(model, torch.zeros(2, 3, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="site='head'"):
        unit_activations(model, TOKENS, site="head")
    with pytest.raises(ValueError, match="most=0"):
        unit_activations(model, TOKENS, most=0)
