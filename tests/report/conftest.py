"""Tiny runs, trained in place, and a report of two of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sa_lens as sa
from sa_lens.config import TrainConfig
from sa_lens.report import Report, make_report
from sa_lens.report.subjects import Subject, open_subjects
from sa_lens.training import train

N_STORIES, N_UNITS = 3, 6
NAMES = ("Anna", "Ben", "Lily", "Tom", "Mia", "Max")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory):
    """Trains a model of two layers for a few steps; its text is shared with the others."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, *, d_mlp: int | None = None, **gates) -> Path:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run = sa.RunConfig(
            model=sa.ModelConfig(n_layers=2, d_model=16, n_heads=2, n_ctx=48, d_mlp=d_mlp, init="gpt2"),
            gates=sa.GateConfig(**{"k_attn": 4, "k_mlp": 8, **gates}),
            data=sa.DataConfig(
                n_stories=300, vocab_size=1000, validation_fraction=0.3, cache_dir=str(folder / "cache")
            ),
            train=TrainConfig(steps=8, batch_size=4, lr=1e-2, eval_every=4, eval_tokens=480, sample_tokens=0),
        )
        train(run, folder / name, device="cpu", progress=False)
        torch.set_num_threads(threads)
        return folder / name

    return make


@pytest.fixture(scope="session")
def gated_run(make_run) -> Path:
    return make_run("gated")


@pytest.fixture(scope="session")
def dense_run(make_run) -> Path:
    return make_run("dense", scope="none")


@pytest.fixture(scope="session")
def attention_run(make_run) -> Path:
    """Without MLPs; its metrics are lost."""
    run = make_run("attention", d_mlp=0)
    (run / "metrics.jsonl").unlink()
    return run


@pytest.fixture(scope="session")
def gated(gated_run: Path) -> Subject:
    return open_subjects([gated_run], "cpu")[0]


@pytest.fixture(scope="session")
def dense(dense_run: Path) -> Subject:
    return open_subjects([dense_run], "cpu")[0]


@pytest.fixture(scope="session")
def easy_task(gated: Subject, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task that the gated model does in both streams, barely trained as it is: to prefer, after a prompt, what its
    own logits prefer there and not after another prompt."""
    tokenizer, model = gated.tokenizer, gated.model
    places = (
        "park",
        "lake",
        "farm",
        "beach",
        "shop",
        "store",
        "house",
        "garden",
        "school",
        "river",
        "market",
        "museum",
    )
    texts = [f"{a} and {b} went to the {place}. {b} gave" for a in NAMES for b in NAMES for place in places if a != b]
    words = {
        tokenizer.decode([i]): i
        for i in range(model.cfg.d_vocab)
        if tokenizer.decode([i])[:1] == " " and tokenizer.decode([i])[1:].isalpha()
    }
    usable = torch.tensor([i for word, i in words.items() if tokenizer.encode(word, add_special_tokens=False) == [i]])
    by_length: dict[int, list[str]] = {}
    for text in texts:
        by_length.setdefault(len(tokenizer.encode(text)), []).append(text)
    same = max(by_length.values(), key=len)
    prompts = []
    with torch.no_grad():
        scores = {}
        for text in same:
            tokens = model.to_tokens(text, prepend_bos=True)
            with model.ablated(position=-1):
                ablated = model(tokens)[0, -1].log_softmax(-1)
            scores[text] = torch.stack([model(tokens)[0, -1].log_softmax(-1), ablated])[:, usable]
    for i, clean in enumerate(same):
        corrupt = same[(i + len(same) // 2) % len(same)]
        gain = (scores[clean] - scores[corrupt]).sum(0)
        best = None
        for a in gain.topk(25).indices.tolist():
            for b in (-gain).topk(25).indices.tolist():
                both = scores[clean][:, a] - scores[clean][:, b]
                if bool((both > 0).all()) and (best is None or float(gain[a] - gain[b]) > best[0]):
                    best = (float(gain[a] - gain[b]), a, b)
        if best is not None:
            answer, wrong = (tokenizer.decode([int(usable[j])]) for j in best[1:])
            prompts.append({"clean": clean, "corrupt": corrupt, "answers": [answer], "wrong_answers": [wrong]})
    path = tmp_path_factory.mktemp("tasks") / "preference.json"
    path.write_text(json.dumps({"prompts": prompts}))
    return str(path)


@pytest.fixture(scope="session")
def report(gated_run: Path, dense_run: Path, easy_task: str) -> Report:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = make_report(
        [gated_run, dense_run],
        n_stories=N_STORIES,
        n_units=N_UNITS,
        tasks=["ioi", easy_task],
        progress=False,
    )
    torch.set_num_threads(threads)
    return found


@pytest.fixture
def without_tokenizer(gated_run: Path, tmp_path: Path) -> Path:
    """The gated run with its tokenizer lost."""
    copy = tmp_path / "mute"
    shutil.copytree(gated_run, copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tokenizer": False}))
    return copy
