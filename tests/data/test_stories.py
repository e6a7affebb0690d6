"""Generated stories: English, coherence by a second reading of the labels, held-out pairs, prompts."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paraphrases import CLASSICS, PARAPHRASES, fill
from readings import split, tellable

from sa_lens.data.stories import (
    HELD_OUT_PATTERNS,
    LABELS,
    NAMES,
    PATTERNS,
    TASKS,
    Story,
    Word,
    draw_prompts,
    generate,
    held_out_pairs,
    prompt_templates,
    telling,
    vocabulary,
)
from sa_lens.data.stories.grammar import pieces_of
from sa_lens.data.stories.patterns import trees

N_TEXTS, N_LABELLED = 8_000, 1_000


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return list(generate(N_TEXTS, seed=0))


@pytest.fixture(scope="module")
def labelled(stories: list[Story]) -> list[Story]:
    return stories[:N_LABELLED]


def sentences(story: Story) -> list[list[Word]]:
    return [list(words) for _, words in itertools.groupby(story.words, key=lambda word: word.sentence)]


def by_role(words: list[Word]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for word in words:
        if word.referent != "none" and word.role != "property":
            found[word.role].append(word.referent)
    return found


# text and labels


def test_words_lie_where_they_say_and_only_single_spaces_lie_between_words(labelled: list[Story]) -> None:
    for story in labelled:
        rest = list(story.text)
        for word in story.words:
            assert story.text[word.start : word.end] == word.text
            rest[word.start : word.end] = [""] * (word.end - word.start)
        assert set("".join(rest)) == {" "}
        assert "  " not in story.text
        assert [word.start for word in story.words] == sorted(word.start for word in story.words)


def test_label_values_are_the_declared_ones_and_all_of_them_occur(stories: list[Story]) -> None:
    seen: dict[str, set[str]] = {label: set() for label in LABELS}
    for story in stories[: 2 * N_LABELLED]:
        for word in story.words:
            for label, values in seen.items():
                values.add(getattr(word, label))
    for label, values in seen.items():
        assert values <= set(LABELS[label]), label
        assert set(LABELS[label]) - values <= {"object-3"}, label
    assert len(seen["pattern"]) >= 30


def test_part_of_speech_of_words_whose_class_is_known(labelled: list[Story]) -> None:
    expected = {
        **dict.fromkeys(NAMES, "PROPN"),
        **dict.fromkeys(("he", "she", "He", "She", "him", "his", "They", "they", "I"), "PRON"),
        "'s": "PART",
        **dict.fromkeys(("a", "an", "the", "The"), "DET"),
        **dict.fromkeys(("ball", "kite", "park", "bench"), "NOUN"),
        **dict.fromkeys(("gave", "handed", "lost", "found", "thanked"), "VERB"),
        **dict.fromkeys((".", ",", '"', "?"), "PUNCT"),
        **dict.fromkeys(("because", "When"), "SCONJ"),
    }
    for word in (word for story in labelled for word in story.words):
        assert word.pos == expected.get(word.text, word.pos), word


def test_referents_count_in_order_of_first_mention(labelled: list[Story]) -> None:
    for story in labelled:
        for kind, known in (("character", story.characters), ("object", story.objects), ("place", story.places)):
            first: dict[str, str] = {}
            for word in story.words:
                if (
                    word.referent.startswith(kind)
                    and word.pos in ("PROPN", "NOUN")
                    and word.text not in ("girl", "boy")
                ):
                    first.setdefault(word.referent, word.text)
            assert first == {f"{kind}-{i}": text for i, text in enumerate(known)}


def test_every_word_is_in_the_vocabulary_and_every_word_of_it_occurs(stories: list[Story]) -> None:
    seen = {word for story in stories for word in re.findall("[A-Za-z]+", story.text.replace("'s", ""))}
    assert seen == vocabulary()
    assert len({word.lower() for word in seen}) >= 250
    assert len(seen & set(NAMES)) >= 40


def test_names_are_no_common_words_and_stand_anywhere(stories: list[Story]) -> None:
    lower = {word.lower() for word in vocabulary() - set(NAMES)}
    assert not {name.lower() for name in NAMES} & lower
    assert min(Counter(NAMES.values()).values()) >= 20
    names = "|".join(NAMES)
    places = {
        "first in a story": rf"^({names})\b",
        "first in a sentence": rf"\. ({names})\b",
        "after a quotation mark": rf'"({names})\b',
        "after a comma": rf", ({names})\b",
        "before a comma": rf"\b({names}),",
        "owner": rf"\b({names})'s\b",
    }
    share = {
        where: sum(re.search(place, story.text) is not None for story in stories) / len(stories)
        for where, place in places.items()
    }
    assert min(share.values()) > 0.01
    assert 0.3 < share["first in a story"] < 0.6
    starts = Counter(story.text.split()[0] for story in stories)
    assert min(starts[name] for name in NAMES) > 20


def test_stories_are_50_to_120_words_in_two_or_three_characters(stories: list[Story]) -> None:
    lengths = [len(story.text.split()) for story in stories]
    assert min(lengths) >= 50
    assert max(lengths) <= 120
    characters = Counter(len(story.characters) for story in stories)
    assert set(characters) == {2, 3}
    assert characters[2] > 0.7 * len(stories)


# English


def test_sentences_are_capitalised_and_end_in_a_mark(labelled: list[Story]) -> None:
    for story in labelled:
        for words in sentences(story):
            text = [word.text for word in words]
            assert (text[1] if text[0] == '"' else text[0])[0].isupper()
            assert text[-1] == "." or text[-2:] == [".", '"']
            assert text.count('"') in (0, 2)
            for before, word in itertools.pairwise(words):
                if word.text[0].isupper() and word.text not in NAMES and word.text != "I":
                    assert before.text == '"'


def test_articles_fit_the_next_word_and_the_first_mention(stories: list[Story]) -> None:
    for story in stories:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b(a|an|the) (a|an|the)\b", story.text)
    for story in stories[:N_LABELLED]:
        mentioned: set[str] = set()
        for words in sentences(story):
            for i, word in enumerate(words):
                if word.role != "object" or word.pos != "NOUN":
                    continue
                article = words[i - 2] if words[i - 1].pos == "ADJ" else words[i - 1]
                if word.referent in mentioned:
                    assert article.text in ("the", "The"), story.text
                else:
                    assert article.text in ("a", "an") or (article.text, word.pattern) == ("the", "give"), story.text
                mentioned.add(word.referent)


# coherence


def test_the_world_is_consistent_when_replayed_from_the_labels_alone(labelled: list[Story]) -> None:
    for story in labelled:
        replay(story)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(min_value=-(10**12), max_value=10**12))
def test_the_world_is_consistent_for_any_seed(seed: int) -> None:
    for story in generate(5, seed):
        replay(story)
        check_pronouns(story)


def replay(story: Story) -> None:
    """Plays the story through: who has each object ("lost": nobody, None: eaten), from roles and patterns alone."""
    has: dict[str, set[str] | None] = {}
    for words in sentences(story):
        pattern, role = words[0].pattern, by_role(words)
        objects = list(dict.fromkeys(role["object"]))
        for thing in objects:
            assert has.get(thing, set()) is not None, f"eaten: {story.text}"
        holders = {thing: has.get(thing) for thing in objects}
        thing = objects[0] if objects else ""
        people = {word.referent for word in words if word.referent.startswith("character")}
        if role["giver"]:
            (giver,), (recipient,) = set(role["giver"]), set(role["recipient"])
            assert giver != recipient
            assert holders[thing] is None or giver in holders[thing], story.text
            has[thing] = {recipient}
        elif pattern == "carry":
            has[thing] = set(role["member"])
        elif pattern == "have_each":
            has.update({thing: {owner} for thing, owner in zip(objects, role["owner"], strict=True)})
        elif pattern == "lies":
            assert holders[thing] is None
            has[thing] = {"lost"}
        elif pattern == "share":
            assert set(role["owner"]) & holders[thing], story.text
        elif pattern in ("have", "buy", "feel_has_new", "find_new"):
            assert holders[thing] is None
            has[thing] = set(role["owner"] + role["finder"])
        elif pattern == "lose":
            assert holders[thing] == set(role["loser"]), story.text
            has[thing] = {"lost"}
        elif pattern in ("find", "take"):
            assert holders[thing] == {"lost"}, story.text
            has[thing] = set(role["finder"])
        elif pattern in ("not_find", "look_for", "ask_where", "tell_lost", "tell_found", "feel_lost"):
            assert holders[thing] == {"lost"}, story.text
        elif pattern == "share_food":
            has[thing] = None
        elif pattern in ("ask_for", "ask_quote", "say_want"):
            assert not set(role["speaker"]) & holders[thing], story.text
        elif pattern in ("want_give", "show", "read_to", "feel_has", "bag", "pick_up", "mend") or (
            pattern.startswith("use_") and pattern != "use_food"
        ):
            able = set(role["owner"] + role["presenter"] + role["holder"] + role["agent"] + role["helper"])
            assert able & holders[thing], story.text
        elif pattern == "thank_for":
            assert set(role["speaker"]) == holders[thing], story.text
        elif thing:
            assert holders[thing], story.text
            assert "lost" not in holders[thing], story.text
        assert len(people) <= 2


def test_pronouns_agree_and_can_mean_one_thing_only(labelled: list[Story]) -> None:
    for story in labelled:
        check_pronouns(story)


def check_pronouns(story: Story) -> None:
    gender = {f"character-{i}": NAMES[name] for i, name in enumerate(story.characters)}
    said: list[list[Word]] = []
    scene = 0
    for words in sentences(story):
        scene = words[0].sentence if words[0].pattern in ("next_day", "meet_new") else scene
        for i, word in enumerate(words):
            before = [w for w in itertools.chain(*said) if w.referent in gender] + [
                w for w in words[:i] if w.referent in gender
            ]
            if word.text.lower() in ("he", "she", "him", "his", "her"):
                want = "boy" if word.text.lower() in ("he", "him", "his") else "girl"
                assert gender[word.referent] == want
                here = {w.referent for w in words[:i] if w.referent in gender}
                if here == {word.referent}:
                    continue
                # the last one of this gender, and no other one in this sentence and the two before it in the scene
                assert [w for w in before if gender[w.referent] == want][-1].referent == word.referent, (
                    word,
                    story.text,
                )
                near = {
                    w.referent
                    for w in itertools.chain(*said[max(scene, len(said) - 2) :], words[:i])
                    if w.referent in gender
                }
                assert {one for one in near if gender[one] == want} <= {word.referent}, story.text
            elif word.text == "it" and word.referent != "none":
                nouns = [w for w in itertools.chain(*said, words[:i]) if w.pos == "NOUN"]
                assert nouns[-1].referent == word.referent, story.text
            elif word.text in ("girl", "boy"):
                assert gender[word.referent] == word.text
            elif word.text in ("I", "you", "You"):
                inside = sum(w.text == '"' for w in words[:i])
                assert inside == 1
                assert word.role == ("speaker" if word.text == "I" else "listener")
        said.append(words)


def test_quoted_speech_is_said_by_the_named_speaker(labelled: list[Story]) -> None:
    for words in (words for story in labelled for words in sentences(story)):
        for one, another in itertools.combinations([w for w in words if w.role in ("speaker", "listener")], 2):
            assert (one.referent == another.referent) == (one.role == another.role)


# what the tasks rest on


def test_indirect_object_sentences_are_frequent_and_name_the_other_character(labelled: list[Story]) -> None:
    counts, orders = [], Counter()
    for story in labelled:
        count = 0
        for words in sentences(story):
            for i, word in enumerate(words):
                if word.role == "recipient" and words[i - 1].text == "to":
                    assert word.pos == "PROPN"
                    count += 1
                    giver = next(w for w in words if w.role == "giver")
                    assert word.referent != giver.referent
                    if len(story.characters) == 2:
                        orders["ABBA" if word.referent == "character-0" else "BABA"] += 1
        counts.append(count)
    assert sum(counts) / len(counts) >= 1.5
    assert sum(count >= 1 for count in counts) >= 0.95 * len(counts)
    assert 0.4 < orders["ABBA"] / orders.total() < 0.6


def test_after_to_in_giving_comes_a_name_and_after_because_mostly_a_pronoun(stories: list[Story]) -> None:
    give = re.compile(
        r"(?:gave|give|handed|hand|passed|pass|offered|offer|lent|sent|sold|threw|kicked|rolled|brought|bring)"
        r" (?:an?|the|it)\b(?: (?!and\b)[a-z]+)*? to (?!the\b)(\w+)"
    )
    why = re.compile(r"\b(?:because|that|until) (\w+) (?:was|had|wanted|liked|loved)\b")
    reasons: Counter[str] = Counter()
    for story in stories:
        assert set(give.findall(story.text)) <= set(NAMES), story.text
        reasons.update(why.findall(story.text))
    pronouns = reasons["he"] + reasons["she"]
    assert pronouns > 0.6 * reasons.total()
    assert set(reasons) - {"it"} <= {"he", "she"} | set(NAMES)


# held-out pairs, determinism, no repetition


def test_held_out_pairs_never_meet_and_all_others_do(stories: list[Story]) -> None:
    met = {frozenset(two) for story in stories for two in itertools.combinations(story.characters, 2)}
    held_out = held_out_pairs()
    assert not met & held_out
    assert met | held_out == {frozenset(two) for two in itertools.combinations(NAMES, 2)}
    assert len(held_out) == round(0.2 * len(NAMES) * (len(NAMES) - 1) / 2)


def test_held_out_pairs_follow_seed_and_argument() -> None:
    assert held_out_pairs(1) == held_out_pairs(1)
    assert held_out_pairs(1) != held_out_pairs(2)
    only = frozenset(("Lily", "Tom"))
    others = {frozenset(two) for two in itertools.combinations(NAMES, 2)} - {only}
    for story in generate(50, held_out_pairs=others):
        assert set(story.characters) == only
    everyone = {
        frozenset(two) for s in generate(3_000, held_out_pairs=()) for two in itertools.combinations(s.characters, 2)
    }
    assert everyone & held_out_pairs()


def test_no_story_twice(stories: list[Story]) -> None:
    assert len({story.text for story in stories}) == N_TEXTS


def test_a_repeated_story_is_told_anew(monkeypatch: pytest.MonkeyPatch, labelled: list[Story]) -> None:
    class Forgetful(telling._Telling):
        def tell(self) -> Story:
            self.n_words = 60
            return labelled[int(self.random() * 12)]

    monkeypatch.setattr(telling, "_Telling", Forgetful)
    twelve = [story.text for story in generate(12)]
    assert len(set(twelve)) == 12
    assert [story.text for story in generate(7)] == twelve[:7]


def test_story_i_of_a_seed_is_the_same_whatever_n(stories: list[Story]) -> None:
    again = list(generate(40, seed=0))
    assert again == stories[:40]
    assert [story.words for story in again] == [story.words for story in stories[:40]]
    assert list(generate(40, seed=1)) != again
    assert list(generate(0)) == []


def test_stories_are_told_one_by_one() -> None:
    assert next(generate(10**12)).text == next(generate(1)).text


def test_bad_input_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="n=-1"):
        generate(-1)
    with pytest.raises(ValueError, match="Nobody"):
        generate(1, held_out_pairs=[frozenset(("Lily", "Nobody"))])
    with pytest.raises(ValueError, match="no two names"):
        generate(1, held_out_pairs=[frozenset(two) for two in itertools.combinations(NAMES, 2)])
    with pytest.raises(ValueError, match=r"share=0\.9"):
        held_out_pairs(share=0.9)


# patterns


def test_every_sentence_is_read_again_by_a_pattern_of_the_stories_and_by_no_held_out_one(stories: list[Story]) -> None:
    for story in stories[:40]:
        for sentence in split(story.text):
            assert tellable(sentence), sentence
            assert not tellable(sentence, held_out=True), sentence


def test_held_out_patterns_use_the_words_of_the_stories() -> None:
    assert not set(HELD_OUT_PATTERNS) & set(PATTERNS)
    pieces = {pair for pattern in HELD_OUT_PATTERNS for tree in trees(pattern) for pair in pieces_of(tree)}
    lower = {word.lower() for word in vocabulary()}
    assert {piece.text for piece, _ in pieces if not piece.var and piece.pos != "PUNCT"} <= lower | {"'s"}


def test_neither_the_order_of_names_nor_how_often_they_occur_tells_who_receives(labelled: list[Story]) -> None:
    guesses: Counter[str] = Counter()
    for story in (story for story in labelled if len(story.characters) == 2):
        names = [word for word in story.words if word.pos == "PROPN"]
        gift = next((i for i, word in enumerate(names) if word.role == "giver"), None)
        if gift is None:
            continue
        before, giver = [word.text for word in names[:gift]], names[gift].text
        if len(set(before)) == 2:
            guesses["first"] += before[0] != giver
            guesses["last"] += before[-1] != giver
            guesses["more often"] += 2 * before.count(giver) < len(before)
            guesses["less often"] += 2 * before.count(giver) > len(before)
            guesses["all"] += 1
    assert guesses["all"] > 500
    for guess in ("first", "last"):
        assert 0.4 < guesses[guess] / guesses["all"] < 0.6, guess
    assert abs(guesses["more often"] - guesses["less often"]) < 0.25 * guesses["all"]


@pytest.mark.parametrize(("task", "at_least"), [("ioi", 24), ("object", 8), ("pronoun", 8), ("repeated", 8)])
def test_no_story_holds_a_paraphrase_though_every_word_is_known(task: str, at_least: int) -> None:
    templates = PARAPHRASES[task]
    assert len(set(templates)) >= at_least
    for template in (*templates, *CLASSICS.get(task, ())):
        first, second = fill(task, template, 2)
        assert set(re.findall("[A-Za-z]+", first.prompt.replace("'s", ""))) <= vocabulary(), template
        assert first != second
        *whole, last = split(second.prompt + second.answer)
        if template in templates:
            assert not (all(map(tellable, whole)) and tellable(last, begins=True)), template


# prompts


@pytest.mark.parametrize("task", TASKS)
def test_prompts_continue_as_stories_do(task: str) -> None:
    """Clean prompt and answer, sentence by sentence, are sentences (the last: the start of one) that stories have."""
    for prompt in draw_prompts(task, 60):
        *whole, last = split(prompt.clean + prompt.answer)
        assert all(map(tellable, whole)), prompt.clean
        assert tellable(last, begins=True), prompt.clean


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_held_out_patterns_have_a_sentence_that_no_story_has(task: str) -> None:
    prompts = draw_prompts(task, 60, patterns="held-out")
    assert not {template.text for template in prompt_templates(task)} & {
        template.text for template in prompt_templates(task, "held-out")
    }
    for prompt in prompts:
        *whole, last = split(prompt.clean + prompt.answer)
        assert not (all(map(tellable, whole)) and tellable(last, begins=True)), prompt.clean
        for sentence in whole:
            assert tellable(sentence) or tellable(sentence, held_out=True), sentence
        assert tellable(last, begins=True) or tellable(last, begins=True, held_out=True), last
    with pytest.raises(ValueError, match="patterns='new'"):
        draw_prompts(task, 1, patterns="new")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_aligned_and_use_the_pairs_asked_for(task: str) -> None:
    pairs = held_out_pairs()
    prompts = draw_prompts(task, 200, seed=3, pairs=pairs)
    assert len({prompt.clean for prompt in prompts}) == 200
    assert prompts == draw_prompts(task, 200, seed=3, pairs=pairs)
    assert prompts != draw_prompts(task, 200, seed=4, pairs=pairs)
    for prompt in prompts:
        clean, corrupt = (re.findall(r"\w+|[.,]", text) for text in (prompt.clean, prompt.corrupt))
        in_clean, in_corrupt = (set(words) & set(NAMES) for words in (clean, corrupt))
        assert len(clean) == len(corrupt)
        assert len(in_clean) == 1 or frozenset(in_clean) in pairs
        assert prompt.answer != prompt.wrong
        assert not prompt.clean.endswith(" ")
        changed = {word for word, other in zip(clean, corrupt, strict=True) if word != other}
        if task == "object":
            assert in_clean == in_corrupt
            assert prompt.answer.strip() in changed
        else:
            assert not in_clean & in_corrupt
            assert changed == in_clean
        if task in ("ioi", "repeated"):
            assert {prompt.answer.strip(), prompt.wrong.strip()} == in_clean
            assert len(in_corrupt) == 3
        if task == "pronoun":
            assert {prompt.answer, prompt.wrong} == {" he", " she"}
            assert {NAMES[a] for a in changed} <= {"girl", "boy"}
            assert all(NAMES[a] != NAMES[b] for a, b in zip(clean, corrupt, strict=True) if a != b)


def test_ioi_prompts_come_in_both_orders_and_the_answer_is_the_one_who_does_not_give() -> None:
    prompts = draw_prompts("ioi", 400)
    orders = Counter(prompt.order for prompt in prompts)
    assert set(orders) == {"ABBA", "BABA"}
    assert min(orders.values()) > 120
    for prompt in prompts:
        first, second = list(dict.fromkeys(word for word in re.findall(r"\w+", prompt.clean) if word in NAMES))
        assert prompt.answer.strip() == (first if prompt.order == "ABBA" else second)
        giver = [word for word in re.findall(r"\w+", prompt.clean) if word in NAMES][-1]
        assert prompt.wrong.strip() == giver


@pytest.mark.parametrize("task", TASKS)
def test_templates_are_distinct_and_count_their_words(task: str) -> None:
    templates = prompt_templates(task)
    assert len({template.text for template in templates}) == len(templates) >= 24
    assert len({template.name for template in templates}) == len(templates)
    lengths = {template.name: template.n_words for template in templates}
    for prompt in draw_prompts(task, 50):
        assert len(re.findall(r"\w+|[.,!?\"]", prompt.clean.replace("'s", " s"))) == lengths[prompt.template]


def test_a_template_says_which_word_it_misses() -> None:
    template = prompt_templates("ioi")[0]
    words = dict.fromkeys(("first", "other"), "Lily") | dict.fromkeys(("second", "subject"), "Tom")
    words |= {"place": "park", "object": "ball"}
    assert re.search(r"\bLily and Tom\b.*\bthe park\b.*\bTom\b.*\bball\b", template.fill(**words))
    with pytest.raises(ValueError, match="needs a word for object"):
        template.fill(**{slot: word for slot, word in words.items() if slot != "object"})
    with pytest.raises(ValueError, match="place='moon'"):
        template.fill(**{**words, "place": "moon"})


def test_bad_prompt_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="task='chess'"):
        draw_prompts("chess", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="templates"):
        draw_prompts("ioi", 1, templates=prompt_templates("object"))
    with pytest.raises(ValueError, match="different gender"):
        draw_prompts("pronoun", 1, pairs=[frozenset(("Lily", "Anna"))])
    with pytest.raises(ValueError, match="n=100000"):
        draw_prompts(
            "repeated", 100_000, pairs=[frozenset(("Lily", "Tom"))], templates=prompt_templates("repeated")[:1]
        )
    assert set(PATTERNS) == set(LABELS["pattern"])
