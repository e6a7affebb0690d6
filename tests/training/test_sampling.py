"""Samples of both streams."""

from __future__ import annotations

import pytest
import torch

from sa_lens.config import DataConfig, GateConfig, ModelConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.data import prepare
from sa_lens.training import Sample, sample


@pytest.fixture(scope="module")
def gated(cache: object) -> SelfAblatingTransformer:
    data = prepare(DataConfig(n_stories=200, vocab_size=900, cache_dir=str(cache)), 16, progress=False)
    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_ctx=16, d_vocab=data.d_vocab)
    return SelfAblatingTransformer(shape, GateConfig(k_attn=2, k_mlp=2), data.tokenizer, device="cpu")


def test_each_stream_is_what_that_stream_generates(gated: SelfAblatingTransformer) -> None:
    drawn = sample(gated, "Once", max_new_tokens=6, temperature=0)
    tokens = gated.to_tokens("Once")
    for stream, text in (("clean", drawn.clean), ("ablated", drawn.ablated)):
        row = tokens
        for _ in range(6):
            streams = gated.run_streams(row)
            logits = streams.clean_logits if stream == "clean" else streams.ablated_logits
            row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
        assert text == gated.tokenizer.decode(row[0, 1:], skip_special_tokens=True)
    assert drawn.clean != drawn.ablated


def test_an_empty_prompt_begins_a_text(gated: SelfAblatingTransformer) -> None:
    drawn = sample(gated, max_new_tokens=1, temperature=0)
    first = gated(torch.tensor([[gated.tokenizer.bos_token_id]]))[0, -1].argmax()
    assert drawn.clean == gated.tokenizer.decode([int(first)], skip_special_tokens=True)


def test_seeds(gated: SelfAblatingTransformer) -> None:
    state = torch.get_rng_state()
    first = sample(gated, "Once", max_new_tokens=8, temperature=2.0, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert sample(gated, "Once", max_new_tokens=8, temperature=2.0, seed=3) == first
    assert sample(gated, "Once", max_new_tokens=8, temperature=2.0, seed=4) != first


def test_it_stops_where_the_model_ends(gated: SelfAblatingTransformer) -> None:
    drawn = sample(gated, "Once", max_new_tokens=1000, temperature=0)
    assert gated.to_tokens(drawn.clean).shape[1] <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"prompt": "Once upon a time there was a girl named Lily who liked to play all day long"}, "shorten it"),
    ],
)
def test_refusals(gated: SelfAblatingTransformer, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(gated, **options)  # type: ignore[arg-type]


def test_columns_by_hand() -> None:
    drawn = Sample("", "one two three", "four\nfive")
    assert drawn.side_by_side(width=23).splitlines() == [
        "clean stream | ablated stream",
        "-----------+------------"[:10] + "-+-" + "-" * 10,
        "one two    | four",
        "three      | five",
    ]
    assert Sample("", "one two", None).side_by_side(width=7).splitlines() == ["clean stream", "-------", "one two"]
