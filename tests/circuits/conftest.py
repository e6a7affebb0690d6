"""A tokenizer trained on a few generated stories, and small models with random weights that read it."""

import pytest
import torch

import sa_lens as sa
from sa_lens.circuits import tasks
from sa_lens.circuits.tasks import tinystories
from sa_lens.data.stories import NAMES, generate
from sa_lens.data.tokenizers import load_tokenizer, train_bpe


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    texts = [story.text for story in generate(1500, 0)]
    train_bpe(texts, folder, vocab_size=1100, keep_whole=list(NAMES), progress=False)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Two layers, every parameter random (biases too), local and global gates."""
    cfg = sa.ModelConfig(
        n_layers=2, d_model=16, n_heads=4, d_mlp=24, n_ctx=48, d_vocab=len(tokenizer), init="gpt2", attn_scale=True
    )
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope="both", k_attn=5, k_mlp=6))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def pairs(tokenizer):
    """Twelve pairs of several lengths."""
    return tasks.ioi(tokenizer, 12, seed=1, words="stories")


@pytest.fixture(scope="session")
def even_pairs(tokenizer):
    """Eight pairs of one length."""
    return tasks.ioi(tokenizer, 8, seed=1, words="stories", templates=["when-give-1"], length=17)


@pytest.fixture(scope="session")
def whole_tokenizer(tmp_path_factory):
    """A tokenizer that keeps the names of the TinyStories templates whole."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    words = [*tinystories.NAMES, *tinystories.OBJECTS, "she", "he"]
    train_bpe(["One day, Lily went to the park."], folder, vocab_size=400, keep_whole=words, progress=False)
    return load_tokenizer(folder)
