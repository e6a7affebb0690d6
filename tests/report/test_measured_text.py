"""The text of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from sa_lens.report.measured_text import STORY_TOKENS, encode_for, gather_texts
from sa_lens.report.subjects import Subject, distinct_names
from sa_lens.training import text_of_run


def test_measured_text_is_the_runs_own(gated: Subject, tmp_path: Path) -> None:
    texts = gather_texts([gated], None, "text", 4)
    own = text_of_run(gated.run, gated.model)
    found = encode_for(gated, texts, tmp_path)
    n = min(found.held_out.n_tokens, own.validation.n_tokens)
    assert n > 5_000
    assert (found.held_out.tokens[:n] == own.validation.tokens[:n]).all()
    calibration = found.calibration_blocks.rows(0, 10**6).flatten().numpy()
    assert (calibration == own.train.tokens[: len(calibration)]).all()
    assert not set(texts.held_out) & set(texts.calibration)
    assert len(texts.stories) == 4
    for story in texts.stories:
        assert any(document.startswith(story) for document in texts.held_out)
    assert texts.name == "validation text of gated"


def test_as_many_tokens_as_are_asked_for(gated: Subject, tmp_path: Path) -> None:
    found = encode_for(gated, gather_texts([gated], None, "text", 4, 2_200), tmp_path)
    # whole documents, which are shorter than 200 tokens
    assert 2_200 <= found.held_out.n_tokens < 2_400
    assert 600 < found.calibration_blocks.n_tokens < 900


def test_named_stories_are_spread_over_the_text(gated: Subject, tmp_path: Path) -> None:
    lines = [f"Anna saw {'a ball. ' * i}" for i in range(1, 9)]
    path = tmp_path / "named.txt"
    path.write_text("\n".join(lines))
    found = gather_texts([gated], str(path), "text", 4).stories
    assert found == tuple(lines[i].strip() for i in (0, 2, 4, 6))


def test_long_stories_are_cut_after_a_word(gated: Subject, tmp_path: Path) -> None:
    words = " ".join(["Anna", "and", "Ben", "ran."] * 200)
    path = tmp_path / "long.txt"
    path.write_text(words + "\n" + "x" * 5_000)
    cut, plain = gather_texts([gated], str(path), "text", 2).stories
    assert words.startswith(cut + " ")
    assert plain == "x" * len(plain)
    for text in (cut, plain):
        n = gated.model.to_tokens(text, prepend_bos=True).shape[1]
        assert 30 < n <= min(STORY_TOKENS, gated.model.cfg.n_ctx)


def test_a_model_without_text_of_its_own_is_measured_on_the_named_one(gated: Subject, tmp_path: Path) -> None:
    bare = Subject("bare", str(gated.model.save_pretrained(tmp_path / "bare")), gated.model, None)
    whole = [f"Story {i}: Anna and Ben ran to the lake, and there were {i} birds." for i in range(300)]
    many, one = tmp_path / "many.txt", tmp_path / "one.txt"
    many.write_text("\n".join(whole))
    found = gather_texts([bare], str(many), "text", 3)
    assert (*found.calibration, *found.held_out) == tuple(whole)
    assert 50 < len(found.calibration) < 150
    assert found.name == "many.txt"
    encode_for(bare, found, tmp_path)
    one.write_text(" ".join(whole))
    found = gather_texts([bare], str(one), "text", 3)
    assert found.calibration[0] + found.held_out[0] == " ".join(whole)
    encode_for(bare, found, tmp_path)


def test_a_long_text_is_read_as_far_as_it_is_needed(gated: Subject, tmp_path: Path) -> None:
    bare = Subject("bare", str(gated.model.save_pretrained(tmp_path / "bare")), gated.model, None)
    sentence = "Anna and Ben ran to the lake, and there were birds. "
    many, one = tmp_path / "many.txt", tmp_path / "one.txt"
    many.write_text("\n".join([sentence] * 2_000))
    one.write_text(sentence * 2_000)
    for path in (many, one):
        texts = gather_texts([bare], str(path), "text", 3, 2_200)
        assert len(texts.held_out[0]) <= len(path.read_text()) // 2
        files = encode_for(bare, texts, tmp_path)
        assert 2_200 <= files.held_out.n_tokens < 2_600
        assert 700 <= files.calibration_blocks.n_tokens < 900


def test_tokens_at_once(gated: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Subject("bare", gated.run, gated.model, None)
    assert gated.settings is not None
    assert gated.n_ctx == gated.settings.model.n_ctx
    assert bare.n_ctx == min(gated.model.cfg.n_ctx, 256)
    monkeypatch.setattr(gated.model.cfg, "n_ctx", 2048)
    assert bare.n_ctx == 256
    assert gated.n_ctx == gated.settings.model.n_ctx


def test_names_are_as_short_as_can_be_told_apart() -> None:
    assert distinct_names(["runs/local"]) == ("local",)
    assert distinct_names(["runs/local", "runs/dense"]) == ("local", "dense")
    assert distinct_names(["a/x/local", "b/x/local", "b/y/dense"]) == ("a/x/local", "b/x/local", "b/y/dense")
    with pytest.raises(ValueError, match="named twice"):
        distinct_names(["owner/model", "owner/model"])
