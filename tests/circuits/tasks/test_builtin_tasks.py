"""Every pair is aligned, of equal length, with single-token answers, and what cannot be is dropped and reported."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from sa_lens.circuits import tasks
from sa_lens.circuits.tasks.pairs import Draft, PromptPairs
from sa_lens.data.stories import NAMES, draw_prompts, held_out_pairs

SHARED = Path(__file__).parents[3] / "../shared/data"


def words_of(pairs, tokenizer, i):
    return tokenizer.decode([pairs.answers[i]]).strip(), tokenizer.decode([pairs.wrong_answers[i]]).strip()


@pytest.mark.parametrize("words", ["tinystories", "stories"])
@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_rows_are_what_the_tokenizer_makes_of_the_texts(task, words, tokenizer, whole_tokenizer):
    tokenizer = tokenizer if words == "stories" else whole_tokenizer
    pairs = tasks.make(task, tokenizer, 24, seed=2, words=words)
    assert len(pairs) == 24 == len(set(pairs.clean_texts))
    for i in range(24):
        length = int(pairs.lengths[i])
        for side, texts in ((pairs.clean, pairs.clean_texts), (pairs.corrupt, pairs.corrupt_texts)):
            row = side[i, -length:].tolist()
            assert row == [tokenizer.bos_token_id, *tokenizer.encode(texts[i])]
            assert (side[i, :-length] == side[i, -length]).all()
        assert "".join(pairs.token_texts[i][1:]) == pairs.clean_texts[i]
        assert pairs.answers[i] != pairs.wrong_answers[i]
        assert pairs.clean[i].tolist() != pairs.corrupt[i].tolist()
    assert (pairs.positions["end"] == -1).all()


@pytest.mark.parametrize("words", ["tinystories", "stories"])
def test_ioi_names(words, tokenizer, whole_tokenizer):
    tokenizer = tokenizer if words == "stories" else whole_tokenizer
    pairs = tasks.ioi(tokenizer, 40, words=words)
    orders = []
    for i in range(40):
        answer, wrong = words_of(pairs, tokenizer, i)
        clean, corrupt = (re.findall(r"\w+", texts[i]) for texts in (pairs.clean_texts, pairs.corrupt_texts))
        if words == "tinystories":
            assert clean.count(wrong) == clean.count(answer) + 1
        assert clean.count(wrong) > 1
        assert answer not in corrupt
        assert wrong not in corrupt
        for name, word in (("IO", answer), ("S1", wrong), ("S2", wrong)):
            # the first word of a prompt has no space before it
            assert tokenizer.decode([pairs.clean[i, pairs.positions[name][i]]]).strip() == word
        fresh = {tokenizer.decode([pairs.corrupt[i, pairs.positions[name][i]]]) for name in ("IO", "S1", "S2")}
        assert len(fresh) == 3
        orders.append(bool(pairs.positions["IO"][i] < pairs.positions["S1"][i]))
        assert pairs.positions["S1"][i] < pairs.positions["S2"][i]
    assert 8 <= sum(orders) <= 32, "both ABBA and BABA"
    if words == "tinystories":
        # templates in turn, then the other order
        assert orders == [(i // 6) % 2 == 0 for i in range(40)]


def test_other_tasks_have_the_answers_they_say(whole_tokenizer):
    pairs = tasks.pronoun_gender(whole_tokenizer, 20)
    assert {words_of(pairs, whole_tokenizer, i) for i in range(20)} == {("she", "he"), ("he", "she")}
    pairs = tasks.object_recall(whole_tokenizer, 20)
    for i in range(20):
        answer, wrong = words_of(pairs, whole_tokenizer, i)
        assert f"{answer} to" in pairs.clean_texts[i]
        assert f"{wrong} to" in pairs.corrupt_texts[i]
    pairs = tasks.repeated_name(whole_tokenizer, 20)
    for i in range(20):
        answer, wrong = words_of(pairs, whole_tokenizer, i)
        assert f"{wrong} and {answer} " in pairs.clean_texts[i]
        assert pairs.clean_texts[i].endswith(f"{wrong} and")
        assert not {answer, wrong} & set(re.findall(r"\w+", pairs.corrupt_texts[i]))


def test_held_out_and_seen_pairs(tokenizer):
    held_out = held_out_pairs()
    for which in ("held-out", "seen"):
        pairs = tasks.ioi(tokenizer, 40, words="stories", name_pairs=which)
        for i in range(40):
            assert (frozenset(words_of(pairs, tokenizer, i)) in held_out) == (which == "held-out")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_patterns_of_the_stories_and_held_out_ones(task, tokenizer):
    texts = {
        patterns: set(tasks.make(task, tokenizer, 10, words="stories", patterns=patterns).clean_texts)
        for patterns in ("seen", "held-out")
    }
    for patterns, clean in texts.items():
        drawn = {prompt.clean for part in range(30) for prompt in draw_prompts(task, 10, seed=part, patterns=patterns)}
        assert clean <= drawn


def test_a_name_at_the_beginning_of_a_prompt_is_a_marked_position():
    class Characters:
        """One token per word, another one for a word without a space before it."""

        bos_token_id = eos_token_id = 0
        unk_token_id = 1

        def encode(self, text, add_special_tokens):
            pieces = re.findall(r" ?\w+|[.,]", text)
            return [2 + self.known.setdefault(piece, len(self.known)) for piece in pieces]

        known: ClassVar[dict[str, int]] = {}

        def decode(self, ids):
            return str(ids)

    draft = Draft("Lily and Tom met. Tom ran to", "Ben and Sam met. Dan ran to", " Lily", " Tom")
    pairs = PromptPairs.from_texts([draft._replace(marks=(("IO", " Lily", 0), ("S1", " Tom", 0)))], Characters())
    assert {name: int(at[0]) for name, at in pairs.positions.items()} == {"IO": -8, "S1": -6, "end": -1}


def test_unseen_pairs_never_met_in_training(tokenizer):
    unseen = tasks.make_unseen("ioi", tokenizer, 12, seed=4, words="stories")
    for i in range(len(unseen)):
        assert frozenset(words_of(unseen, tokenizer, i)) in held_out_pairs()
    for task, words in (("ioi", "tinystories"), ("object", "stories")):
        found = tasks.make_unseen(task, tokenizer, 12, seed=4, words=words)
        assert found.clean_texts == tasks.make(task, tokenizer, 12, seed=4, words=words).clean_texts


def test_same_seed_same_pairs(tokenizer):
    one, same, other = (tasks.ioi(tokenizer, 10, seed=seed, words="stories") for seed in (4, 4, 5))
    assert one.clean_texts == same.clean_texts
    assert one.corrupt_texts == same.corrupt_texts
    assert not set(one.clean_texts) & set(other.clean_texts)


def test_own_names_and_templates(tokenizer):
    names = list(NAMES)[:6]
    pairs = tasks.ioi(
        tokenizer, 12, names=names, templates=["One day, {first} and {second} met. {subject} gave {object} to"]
    )
    assert all(text.startswith("One day, ") for text in pairs.clean_texts)
    pairs = tasks.ioi(tokenizer, 12, words="stories", names=names, templates=["when-give"])
    for i in range(12):
        assert set(words_of(pairs, tokenizer, i)) <= set(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": [*list(NAMES)[:5], "Bartholomew"]}, "'Bartholomew' is not a single token"),
        ({"names": ["Lily", "Tom"]}, "at least five"),
        ({"names": ["Lily", "Lily", *list(NAMES)[5:9]]}, "different"),
        ({"templates": ["{first} and {second} met. {giver} gave"]}, "unknown slot {giver}"),
        ({"templates": ["{first} and {second} met and gave to"]}, "no slot {subject}"),
        ({"templates": []}, "at least one"),
        ({"words": "stories", "templates": ["go-swim"]}, "'go-swim'.*go-give"),
        ({"words": "stories", "names": ["Zorro", *list(NAMES)[:5]]}, "'Zorro'"),
        ({"words": "moon"}, "words='moon'"),
        ({"name_pairs": "odd"}, "name_pairs='odd'"),
        ({"name_pairs": "seen"}, "need words='stories'"),
        ({"patterns": "held-out"}, "need words='stories'"),
        ({"words": "stories", "patterns": "odd"}, "patterns='odd'"),
        ({"n": 0}, "n=0"),
        ({"words": "stories", "length": 3}, "not 3 tokens long"),
    ],
)
def test_bad_arguments_are_named(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tasks.ioi(tokenizer, **{"n": 8, **options})


def test_unknown_task(tokenizer):
    with pytest.raises(ValueError, match=r"task='ioy' is none of ioi, pronoun"):
        tasks.make("ioy", tokenizer)


def draft(name="Lily", other="Tom", **changes):
    clean = f"One day, {name} and {other} went to the park. {other} gave a ball to"
    corrupt = "One day, Ben and Sam went to the park. Joe gave a ball to"
    return Draft(clean, corrupt, f" {name}", f" {other}")._replace(**changes)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (draft("Nora", "Fred", answer=" Bartholomew"), "answer is not one token"),
        (draft("Nora", "Fred", wrong_answer=" Bartholomew"), "wrong answer is not one token"),
        (draft("Nora", "Fred", wrong_answer=" Nora"), "answer and wrong answer are the same"),
        (draft("Nora", "Fred", corrupt="One day, Ben went to the park."), "clean and corrupt differ in length"),
        (draft("Nora", "Fred", corrupt=draft("Nora", "Fred").clean), "clean and corrupt are the same"),
        (draft("Mia", "Anna"), "clean prompt already there"),
    ],
)
def test_what_cannot_be_used_is_dropped_and_reported(bad, reason, tokenizer):
    good = [draft(), draft("Mia", "Anna")]
    pairs = PromptPairs.from_texts([*good, bad], tokenizer, task="made")
    assert len(pairs) == 2
    assert pairs.dropped == {reason: 1}
    assert pairs.report() == f"made: kept 2 of 3 pairs; 1 dropped: {reason}"
    assert repr(pairs) == f"<PromptPairs {pairs.report()}>"
    with pytest.raises(ValueError, match=rf"2 usable pairs with this tokenizer, 3 needed\s+1 dropped: {reason}"):
        PromptPairs.from_texts([*good, bad], tokenizer, task="made", minimum=3)


def test_split_is_disjoint_and_complete(pairs):
    find, report = pairs.split(seed=0)
    assert len(find) == len(report) == 6
    assert set(find.clean_texts) | set(report.clean_texts) == set(pairs.clean_texts)
    assert not set(find.clean_texts) & set(report.clean_texts)
    again, _ = pairs.split(seed=0)
    assert again.clean_texts == find.clean_texts
    assert pairs.split(seed=1)[0].clean_texts != find.clean_texts
    for share in (0, 1, 0.01):
        with pytest.raises(ValueError, match="share"):
            pairs.split(share=share)


def test_groups_have_one_length_no_padding_and_every_pair_once(pairs):
    assert not pairs.uniform
    seen = []
    for rows, group in pairs.by_length(at_most=2):
        assert len(group) <= 2
        assert group.uniform
        assert (group.lengths == group.clean.shape[1]).all()
        for at, row in enumerate(rows.tolist()):
            assert group.clean_texts[at] == pairs.clean_texts[row]
            for name, offset in pairs.positions.items():
                assert group.clean[at, group.positions[name][at]] == pairs.clean[row, offset[row]]
        seen += rows.tolist()
    assert sorted(seen) == list(range(12))


def test_json_is_read(tmp_path, tokenizer):
    path = tmp_path / "mine.json"
    prompts = [
        {"clean": d.clean, "corrupt": d.corrupt, "answers": [d.answer], "wrong_answers": [d.wrong_answer]}
        for d in (draft(), draft("Mia", "Anna"), draft("Mia", "Anna", answer=" Bartholomew", clean="Anna and"))
    ]
    path.write_text(json.dumps({"prompts": prompts, "word_idxs": {"IO": 2}}))
    pairs = tasks.read_json(path, tokenizer, minimum=2)
    assert pairs.task == "mine"
    assert pairs.clean_texts == (draft().clean, draft("Mia", "Anna").clean)
    assert list(pairs.positions) == ["IO", "S1", "S2", "end"]
    assert tasks.make(str(path), tokenizer, 2).clean_texts != ()
    assert len(tasks.make(str(path), tokenizer, 128)) == 2
    with pytest.raises(ValueError, match=r"2 usable pairs with this tokenizer, 3 needed[\s\S]*Change these prompts"):
        tasks.read_json(path, tokenizer, minimum=3)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        tasks.read_json(tmp_path / "none.json", tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name.*; make it JSON with `prompts`"),
        ("[]", "it must be an object"),
        ('{"prompts": 3}', "prompts must be of type list, not 3"),
        ('{"prompts": [3]}', r"prompts\[0\] must be an object"),
        ('{"prompts": [{"clean": "a"}]}', r"prompts\[0\] lacks 'corrupt'.*; make it JSON with `prompts`"),
        (
            '{"prompts": [{"clean": 5, "corrupt": "b", "answers": ["c"], "wrong_answers": ["e"]}]}',
            "clean must be of type str",
        ),
        ('{"prompts": [{"clean": "a", "corrupt": "b", "answers": [3], "wrong_answers": ["e"]}]}', "exactly one word"),
        ('{"prompts": [{"clean": "\\ud800", "corrupt": "b", "answers": ["c"], "wrong_answers": ["e"]}]}', "surrogate"),
        (
            '{"prompts": [{"clean": "a", "corrupt": "b", "answers": ["c", "d"], "wrong_answers": ["e"]}]}',
            r"prompts\[0\]\.answers=",
        ),
    ],
)
def test_other_json_is_refused(content, message, tmp_path, tokenizer):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.json holds no prompt pairs: .*{message}"):
        tasks.read_json(path, tokenizer)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared TinyStories data")
def test_published_prompts_with_gpt2_tokens():
    from sa_lens.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(SHARED / "gpt2-tokenizer")
    pairs = tasks.read_json(SHARED / "ioi-tinystories.json", tokenizer)
    # 1,000 prompts, one of them twice
    assert len(pairs) == 999
    assert pairs.dropped == {"clean prompt already there": 1}
    assert set(pairs.lengths.tolist()) == {15, 16, 18, 19, 20, 21}
    assert list(pairs.positions) == ["IO", "S1", "S2", "end"]
    assert len(tasks.ioi(tokenizer, 256)) == 256
