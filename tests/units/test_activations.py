"""Units are streamed as hooks show them, in both streams, whatever the batches."""

import numpy as np
import pytest
import torch

import sa_lens as sa
from sa_lens.core.fused import reads_fused
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.data.tokens import write_tokens
from sa_lens.units.activations import TOKENS_AT_ONCE, read_by_hooks, read_units, stream_units


def gathered(model, text, streams, **options):
    batches = list(stream_units(model, text, streams, progress=False, **options))
    values = {
        stream: {
            sublayer: torch.cat([b.values[stream][sublayer] for b in batches]) for sublayer in batches[0].values[stream]
        }
        for stream in batches[0].values
    }
    masks = {sublayer: torch.cat([b.masks[sublayer] for b in batches]) for sublayer in batches[0].masks}
    return torch.cat([b.tokens for b in batches]), values, masks


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_values_and_masks_are_those_of_the_hooks(gated, text, at_once, monkeypatch):
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", at_once)
    with torch.no_grad():
        _, clean = gated.run_with_cache(text)
        with gated.ablated():
            _, ablated = gated.run_with_cache(text)
    tokens, values, masks = gathered(gated, text, ("clean", "ablated"))
    assert torch.equal(tokens, text)
    for sublayer, n in unit_counts(gated).items():
        for stream, cache in (("clean", clean), ("ablated", ablated)):
            assert values[stream][sublayer].shape[-1] == n
            torch.testing.assert_close(values[stream][sublayer], cache[sublayer.value_hook].flatten(2))
        assert torch.equal(masks[sublayer], ablated[sublayer.mask_hook].flatten(2))


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_one_stream_alone_gives_the_same_values(gated, text, stream):
    _, both, _ = gathered(gated, text, ("clean", "ablated"))
    _, alone, masks = gathered(gated, text, stream)
    assert bool(masks) == (stream == "ablated")
    for sublayer in unit_counts(gated):
        torch.testing.assert_close(alone[stream][sublayer], both[stream][sublayer])


def test_masks_of_whole_heads_are_repeated_for_their_units(text):
    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_ctx=16, d_vocab=24)
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=1, k_mlp=2, attn_unit="head"), device="cpu")
    _, values, masks = gathered(model, text, "ablated")
    mask = masks[Sublayer(0, "attn")]
    assert mask.shape == values["ablated"][Sublayer(0, "attn")].shape
    heads = mask.unflatten(-1, (2, 4))
    assert torch.equal(heads, heads[..., :1].expand_as(heads))
    assert torch.equal(heads[..., 0].sum(-1), torch.ones(12, 16))


def test_a_token_file_is_read_in_blocks_from_its_beginning(tmp_path, gated, word_tokenizer):
    file = write_tokens(tmp_path / "a.bin", ["a b c d e " * 9] * 3, word_tokenizer, name="test", progress=False)
    blocks = TextBlocks(TokenFile.open(file.path), 16, n_tokens=70)
    flat = np.asarray(file.tokens)[:64].astype(np.int64)
    assert len(blocks) == 4
    assert torch.equal(blocks.rows(0, 9), torch.from_numpy(flat).view(4, 16))
    assert torch.equal(blocks.pick(torch.tensor([2, 0])), torch.from_numpy(flat).view(4, 16)[[2, 0]])


def test_a_limit_holds_for_every_kind_of_text(gated, text):
    blocks = TextBlocks(text, 16, n_tokens=100)
    assert (len(blocks), blocks.n_tokens) == (6, 96)
    for source, limit, expected in (
        (text, 50, 3),
        (blocks, 50, 3),
        (blocks, None, 6),
        (blocks, 10_000, 6),
        (text, 1, 1),
    ):
        read = [b.tokens for b in stream_units(gated, source, n_tokens=limit, progress=False)]
        assert torch.equal(torch.cat(read), text[:expected])
    with pytest.raises(ValueError, match="n_tokens=0"):
        stream_units(gated, text, n_tokens=0)


def test_nothing_of_the_caller_is_disturbed(gated, text):
    with gated.ablated():
        list(stream_units(gated, text, "clean", progress=False))
        inside = gated(text)
    torch.testing.assert_close(inside, gated.run_streams(text).ablated_logits)


def test_bad_input_is_refused_at_once(gated, planted, text, tmp_path, word_tokenizer):
    with pytest.raises(ValueError, match="must be 'clean' or 'ablated'"):
        stream_units(gated, text, "both")
    with pytest.raises(ValueError, match="needs gates"):
        stream_units(planted, text, "ablated")
    with pytest.raises(ValueError, match="no units at"):
        stream_units(gated, text, sublayers=[Sublayer(7, "mlp")])
    with pytest.raises(ValueError, match="longer than n_ctx=16"):
        stream_units(gated, text.view(6, 32))
    with pytest.raises(ValueError, match="vocabulary of 24"):
        stream_units(gated, text + 20)
    with pytest.raises(ValueError, match="empty"):
        stream_units(gated, text[:0])
    with pytest.raises(ValueError, match="integers"):
        stream_units(gated, text.float())
    short = write_tokens(tmp_path / "short.bin", ["a b"], word_tokenizer, name="test", progress=False)
    with pytest.raises(ValueError, match="fewer than one block"):
        stream_units(gated, short)
    with pytest.raises(ValueError, match="text is empty"):
        write_tokens(tmp_path / "none.bin", [], word_tokenizer, name="test", progress=False)


@pytest.mark.parametrize("streams", [("clean",), ("ablated",), ("clean", "ablated")], ids="+".join)
@pytest.mark.parametrize(
    "gates",
    [
        sa.GateConfig(k_attn=6, k_mlp=7),
        sa.GateConfig(scope="global", k_attn=6, k_mlp=7),
        sa.GateConfig(scope="both", k_attn=1, k_mlp=20, attn_unit="head"),
        sa.GateConfig(kind="soft", k_attn=3, k_mlp=3),
        sa.GateConfig(scores="random-token", k_attn=3, k_mlp=3),
    ],
    ids=["local", "global", "both, whole heads, all neurons", "soft", "random"],
)
def test_without_hooks_the_values_are_the_same(gates, streams, text):
    cfg = sa.ModelConfig(n_layers=3, d_model=16, n_heads=2, d_mlp=20, n_ctx=16, d_vocab=24, init="gpt2")
    assert_same_values(cfg, gates, streams, text)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_without_hooks_the_values_of_a_llama_are_the_same(scope, text):
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 20, "n_ctx": 16, "d_vocab": 24}
    positions = {"positional_embedding_type": "rotary", "rotary_dim": 4, "n_key_value_heads": 2}
    mlps = {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}
    cfg = sa.HookedTransformerConfig(**sizes, **positions, **mlps, device="cpu")
    assert_same_values(cfg, sa.GateConfig(scope=scope, k_attn=6, k_mlp=7), ("clean", "ablated"), text)


def assert_same_values(cfg, gates, streams, text):
    # in float64, because a soft gate divides by the gap between two scores, which may be tiny
    model = sa.SelfAblatingTransformer(cfg, gates, seed=2, device="cpu").requires_grad_(False)
    model.to(torch.float64, print_details=False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    # a loaded state may bring biases that the model was built without
    model.load_state_dict(model.state_dict())
    sublayers = list(unit_counts(model))
    assert reads_fused(model)
    fast, slow = (read(model, text, streams, sublayers) for read in (read_units, read_by_hooks))
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_a_hook_of_the_user_is_heard(gated, text):
    sublayers = [Sublayer(1, "mlp")]
    gated.add_hook("blocks.0.hook_resid_post", lambda x, hook: 0 * x)
    try:
        assert not reads_fused(gated)
        (values, _), (expected, _) = (read(gated, text, ("clean",), sublayers) for read in (read_units, read_by_hooks))
    finally:
        gated.reset_hooks()
    assert torch.equal(values["clean"][sublayers[0]], expected["clean"][sublayers[0]])
    assert float(values["clean"][sublayers[0]].std(1).max()) < 1e-5, "positions no longer differ"
