"""Small models: one with random weights and gates, and one whose neurons are wired by hand."""

from __future__ import annotations

import pytest
import torch

import sa_lens as sa
from sa_lens.core import HookedTransformer, HookedTransformerConfig

D_VOCAB = 24
N_CTX = 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gated():
    """Two layers, random weights and biases, local and global gates."""
    cfg = sa.ModelConfig(
        n_layers=2, d_model=16, n_heads=2, d_mlp=20, n_ctx=N_CTX, d_vocab=D_VOCAB, init="gpt2", attn_scale=True
    )
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope="both", k_attn=6, k_mlp=7), device="cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def text():
    """Twelve blocks of random tokens; some tokens are frequent."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1.0, D_VOCAB + 1)
    return torch.multinomial(weights, 12 * N_CTX, replacement=True, generator=generator).view(12, N_CTX)


@pytest.fixture(scope="session")
def calibration():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, D_VOCAB, (80, N_CTX), generator=generator)


@pytest.fixture(scope="session")
def planted():
    """One layer in which neuron 0 fires on tokens 3 to 6, neurons 1 and 2 on token 7, neuron 3 never, neuron 4 on
    every token, neuron 5 on tokens in the second half of a block; all else is silent.

    The residual stream is a one-hot vector of the token and one of the position's half; there is no LayerNorm.
    """
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=D_VOCAB + 2,
        n_heads=1,
        d_head=4,
        d_mlp=6,
        n_ctx=N_CTX,
        d_vocab=D_VOCAB,
        act_fn="relu",
        normalization_type=None,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :D_VOCAB] = torch.eye(D_VOCAB)
        model.pos_embed.W_pos[: N_CTX // 2, D_VOCAB] = 1
        model.pos_embed.W_pos[N_CTX // 2 :, D_VOCAB + 1] = 1
        w_in = model.blocks[0].mlp.W_in
        w_in[3:7, 0] = 1
        w_in[7, 1] = 1
        w_in[7, 2] = 2
        w_in[:, 3] = -1
        w_in[:D_VOCAB, 4] = 1
        w_in[D_VOCAB + 1, 5] = 1
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def even_text():
    """Every token once at every position, in an order that differs from block to block."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(D_VOCAB, generator=generator)[:N_CTX] for _ in range(D_VOCAB * 4)])


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """A tokenizer of 24 tokens: letters, a space and end-of-text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<|endoftext|>", " ", *"abcdefghijklmnopqrstuv"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


@pytest.fixture(scope="session")
def story_tokenizer(tmp_path_factory):
    """A byte-level BPE trained on generated stories."""
    from sa_lens.data.stories import NAMES, generate
    from sa_lens.data.tokenizers import load_tokenizer, train_bpe

    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    texts = [story.text for story in generate(300, 0)]
    train_bpe(texts, folder, vocab_size=700, keep_whole=list(NAMES), progress=False)
    return load_tokenizer(folder)
