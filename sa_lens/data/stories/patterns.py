"""The sentences of the generated stories, composed of clauses: who, when, where, what (marks: see `grammar`).

A pattern is a list of templates, each equally likely; it is also the label of every word of its sentences. To add a way
of saying something, add a template; to add a part that many sentences share, add a fragment. Names may come anywhere:
first in a story, after a comma, after a quotation mark. In a story a giving sentence always names the receiver.
"""

from __future__ import annotations

from functools import cache

from sa_lens.data.stories.grammar import CHARACTERS, OBJECTS, Choice, Node, parse, pieces_of
from sa_lens.data.stories.words import (
    ADJECTIVES,
    ANIMALS,
    GLAD,
    INDOOR_SPOTS,
    KIND_OF,
    NAMES,
    NEEDY,
    OUTDOOR_SPOTS,
    PARTS_OF_SPEECH,
    PLACES,
    PROUD,
    SAD,
    character,
)

FRAGMENTS: dict[str, tuple[str, ...]] = {
    # when: at the start of a story, of a later scene, of a sentence in between
    "once": (
        *("", "", "", "", "", "", "", "one day,", "one day,", "one [morning|afternoon|evening],"),
        *(
            "one [sunny|warm|windy|lovely] day,",
            "after [school|lunch|dinner|breakfast],",
            "on a [sunny|warm|lovely] day,",
        ),
        *(
            "[yesterday|today],",
            "in the [morning|evening],",
            "last week,",
            "once,",
            "it was a [sunny|warm|lovely] day, and",
        ),
        "<then>",
    ),
    "long_ago": ("once upon a time,", "once upon a time", "long ago,", "once", "", ""),
    "at_end": (
        "[one|that/DET] [day|morning|afternoon|evening]",
        "[yesterday|today|once|again]",
        "after [school|lunch|dinner]",
        "in the [morning|evening]",
        "on a [sunny|warm|lovely|windy] day",
        "every [day|morning]",
    ),
    "next_day": (
        "the next/ADJ [day|morning],",
        "later,",
        "later that/DET day,",
        "another day,",
        "then",
        "in the evening,",
        "after [lunch|dinner],",
        "",
    ),
    "then": (
        "then",
        "then",
        "then,",
        "soon",
        "soon,",
        "later,",
        "later",
        "afterwards,",
        "later that/DET day,",
        "after a while/NOUN,",
        "after that/PRON,",
        "at last/NOUN,",
        "suddenly,",
        "now",
        "in the end,",
        "so",
        "and then",
        "but then",
        "just then,",
        "finally,",
        "a little later,",
        "still,",
        "that/DET [morning|afternoon|evening],",
        "after some time,",
    ),
    "perhaps_then": ("", "", "", "<then>"),
    # what two characters do together; who they are
    "moved": ("went", "went", "walked", "ran", "came"),
    "both": (
        "they",
        "they",
        "{x:member} and {y:member}",
        "{x:member} and {y:member}",
        "both {x:member} and {y:member}",
        "{x:member} and {x.his:member} friend {y:member}",
    ),
    "pair": (
        *("{x:member} and {y:member}",) * 6,
        "both {x:member} and {y:member}",
        "{x:member} and {x.his:member} friend {y:member}",
        "{x:member} and {x.his:member} friend, {y:member},",
        "two friends, {x:member} and {y:member},",
        "[friends|the children|the two/NUM friends] {x:member} and {y:member}",
        "{x:member}, with {y:member},",
    ),
    "pair_went": (
        "<moved> to {p}",
        "<moved> to {p}",
        "<moved> to {p}",
        "<moved> to {p} together",
        "<moved> to {p} to/PART play",
        "[played|met|sat|talked|were/VERB] [{p.at}|{p.at}|near] {p}",
        "were/VERB {p.at} {p}",
        "were/VERB [playing|walking|sitting|working|talking] {p.at} {p}",
        "were/VERB thinking about going to {p}",
        "had/VERB a [long|good] talk {p.at} {p}",
        "played together {p.at} {p}",
        "had/VERB [a lot of|so much/ADJ] fun {p.at} {p}",
        "wanted to/PART [go|run/VERB|walk/VERB] to {p}",
        "were/VERB on the way to {p}",
        "[liked|loved] to/PART [play|sit/VERB|walk/VERB|talk/VERB] {p.at} {p}",
        "decided to/PART go to {p}",
    ),
    "with_friend": (
        "{x:agent} <moved> to {p} with {y:friend}",
        "{x:agent} <moved> to {p} with {x.his:agent} friend {y:friend}",
        "{x:agent} [played|sat|was/VERB] {p.at} {p} with {y:friend}",
        "{x:agent} was/VERB with {y:friend} {p.at} {p}",
        "{x:agent} [met|saw|found|visited] {y:friend} {p.at} {p}",
        "{x:agent} [met|saw] {x.his:agent} friend {y:friend} [{p.at}|near] {p}",
        "{x:agent} [took|invited|brought] {y:friend} to {p}",
        "{x:agent} asked {y:friend} to/PART [come|go] to {p}",
        "{x:agent} [was/VERB|played|sat|was/VERB playing] {p.at} {p} when {y:friend} came[| by/ADV| too| to/PART play]",
        "[when|as] {x:agent} <moved> to {p}, {y:friend} was/VERB there/ADV",
        "[when|while|as] {x:agent} [played|sat|was/VERB] {p.at} {p}, {y:friend} came[| by/ADV| too| to/PART play]",
        "{x:agent} <moved> to {p} because {y:friend} was/VERB there/ADV",
        "{x:agent} was/VERB {p.at} {p}[, and|, but| and] {y:friend} was/VERB [there/ADV|{p.at} {p}] too",
        "{x:agent} <moved> to {p}, and {y:friend} [went|came] [too|with {x.him:agent}]",
        "{x:experiencer} was/VERB [very|so] {f} because {y:friend} came [to/PART play|to {p}]",
    ),
    # clauses before a giving clause: they name nobody, both, the giver or the receiver
    "before": (
        *("",) * 14,
        *("<then>",) * 5,
        "<when>",
        "<when>",
        "<when>",
        "<and>",
        "<and>",
        "<then> <when>",
        "[smiling|laughing|with a smile/NOUN],",
        "<then> [smiling|with a smile/NOUN],",
    ),
    "when": (
        "[when|while|as] they were/VERB {p.at} {p},",
        "[when|while|as] they [played|sat|talked|walked][| together| there/ADV],",
        "after/SCONJ they [played|sat down/ADV|talked][| for a while/NOUN],",
        "before/SCONJ they went home/ADV,",
        "[when|while|as] {x:member} and {y:member} were/VERB [{p.at} {p}|there/ADV|together],",
        "after/SCONJ {x:member} and {y:member} [played|sat down/ADV|talked],",
        "[when|after/SCONJ] {g:agent} [saw|met|looked at] {r:friend},",
        "[when|after/SCONJ] {r:friend} [saw|looked at] {g:agent},",
        "[when|as|after/SCONJ] {r:friend} [smiled|came back|sat down/ADV|laughed|waved],",
        "[when|as|after/SCONJ] {g:agent} [smiled|came back|sat down/ADV|stood up/ADV],",
        "because {r:friend} was/VERB [sad|kind|good|tired|late],",
        "because {g:agent} was/VERB [kind|good|happy],",
        "because {g:agent} liked {r:friend},",
        "because it was a [sunny|warm|lovely] day,",
    ),
    "and": (
        "{r:friend} [smiled|came over|sat down/ADV|stopped|was/VERB happy][,|, and|, so| and]",
        "{g:agent} [saw|liked|met|looked at] {r:friend}[,| and|, and|, so]",
        "{r:friend} [saw|liked|met|looked at] {g:agent}[, and|, and|, so| and]",
        "they [sat down/ADV|stopped|talked][| for a while/NOUN][, and| and]",
        "{r:friend} was/VERB [sad|tired|{f}], [so|but|and]",
        "{g:agent} [knew|saw|thought] that/SCONJ {r:friend} was/VERB [sad|good|tired|kind], so",
        "it was/VERB [late|time to/PART go home/ADV|a good day][, so|, and|, but]",
        "the [sun was/VERB warm|sky was/VERB blue][, and| and|, so]",
    ),
    "when_pair": (
        "[when|while|as] {x:member} and {y:member} were/VERB [{p.at}|near] {p},",
        "[when|after/SCONJ|before/SCONJ|as] {x:member} and {y:member} <moved> to {p},",
        "[when|while] {x:member} and {y:member} [played|sat|talked|met|were/VERB playing] [{p.at}|near] {p},",
        "[when|after/SCONJ|as] {x:member} [met|saw|visited|found] {y:member} {p.at} {p},",
    ),
    "and_then": (", and", ", so", "and then", ", and then", ", but", ", and [afterwards|soon|later|so]"),
    # giving
    "gave": (
        "gave",
        "gave",
        "gave",
        "gave",
        "handed",
        "handed",
        "passed",
        "offered",
        "brought",
        "took",
        "[decided|chose|started|came over|stopped|was/VERB {f}] to/PART [give|give|hand/VERB|pass|offer|bring]",
        "did not/PART wait/VERB to/PART [give|hand/VERB]",
    ),
    "kindly": ("", "", "", "", "[kindly|quickly|gently|happily|slowly|also|finally]"),
    "first_act": (
        "smiled",
        "laughed",
        "stopped",
        "ran over",
        "walked over",
        "came back",
        "sat down/ADV",
        "stood up/ADV",
        "turned around/ADV",
        "went over",
        "jumped up/ADV",
        "said hello",
        "said yes",
        "was/VERB {f}",
    ),
    "after_gift": (
        *("",) * 16,
        "with a smile/NOUN",
        "again",
        "to/PART [play with/ADV|hold|see|keep]",
        "{p.at} {p}",
        "and smiled",
        "and sat down/ADV",
        "because {g.he:giver} was/VERB [kind|good|{f}]",
        ", and they were/VERB {f}",
        ", and {r:recipient} was/VERB {f}",
        "and {r:recipient} [smiled|said yes|laughed]",
        "before/SCONJ they went home/ADV",
    ),
    "very": ("", "very", "so"),
}

PATTERNS: dict[str, tuple[str, ...]] = {
    # introductions: one of them, both, both at a place
    "weather": (
        "it was a [sunny|warm|bright|windy|cool|lovely] [day|morning|afternoon].",
        "the [sun was warm|sky was blue|sun was bright|birds were singing/VERB|wind was soft].",
    ),
    "intro_one": (
        "<long_ago> there was a [little|young|kind|clever|brave] {x.girl:protagonist} named {x:protagonist}.",
        "{x:protagonist} was a [little|young|kind|clever|brave|good] {x.girl:protagonist}.",
    ),
    "intro_home": ("{x?:agent} lived in a [small|big|little|white] house[| near {p}].",),
    "intro_likes": ("{x?:experiencer} [loved|liked] to/PART [play|read|sing|dance|draw|swim] [every day|outside|].",),
    "intro_friend": (
        "{x?:agent} had/VERB a [good|best|] friend named {y:friend}.",
        "{x.his:agent} [best|good|] friend was {y:friend}.",
        "{y:friend} was {x.his:agent} [best|good|] friend.",
        "{y:friend} was {x:agent}'s [best|good|] friend.",
        "{x?:agent} often/ADV played with {y:friend}.",
        "{x?:agent} [knew|liked|loved] {y:friend}.",
        "{x?:agent} and {y:friend} were/VERB [good|best|] friends.",
    ),
    "intro_two": (
        "<long_ago> there were two [friends|children|good friends] named {x:member} and {y:member}.",
        "<long_ago> there were two [friends|children], {x:member} and {y:member}.",
        "{x:member} and {y:member} were/VERB [best|good|] friends.",
        "{x:member} and {y:member} were/VERB two [good|little|young] friends.",
        "{x:member} and {y:member} lived near {p}.",
        "{x:member} and {y:member} [liked|loved] to/PART [play|read|sing|dance|draw] together.",
        "{x:member} had/VERB a [good|best|] friend named {y:member}.",
        "{x:member} lived near {y:member}.",
        "{x:member} was a [little|kind] {x.girl:member}, and {y:member} was a [little|kind] {y.girl:member}.",
        "this/PRON is/VERB a story about {x:member} and {y:member}.",
        "{x:member} was {y:member}'s [best|good|] friend.",
    ),
    "intro_two_like": (
        "<both> [loved|liked] to/PART [play|read|sing|dance|draw|swim] [together|every day|].",
        "every [day|morning|evening], <both> [played|walked|sang|talked] together.",
    ),
    "go": (
        *("<once> <pair> <pair_went>.",) * 4,
        "<pair> <pair_went> <at_end>.",
        "<once> <with_friend>.",
        "<once> <with_friend>.",
        "<with_friend> <at_end>.",
    ),
    "next_day": ("<next_day> <pair> <pair_went>.", "<next_day> <with_friend>."),
    "carry": (
        "<once> {x:member} and {y:member} [took|brought] {o} to {p}.",
        "{x:member} and {y:member} [had/VERB|found|got] {o} {p.at} {p}.",
        "<once> {x:member} and {y:member} <moved> to {p} with {o}.",
    ),
    "go_alone": (
        "<once> {x?:agent} [<moved>|wanted to/PART go] to {p}.",
        "<once> {x?:agent} [was/VERB|played|sat|was/VERB [playing|walking|sitting]] {p.at} {p}.",
    ),
    "meet": (
        "<perhaps_then> {x?:agent} [met|saw|found|visited|played with|talked to] {y:friend}[| there/ADV].",
        "{y:friend} [came|was/VERB there/ADV|was/VERB {p.at} {p}|went there/ADV|came to {p}] too.",
        "<perhaps_then> {y:friend} came [by/ADV|over|to/PART play|to {p}].",
        "{x.his:agent} friend {y:friend} was/VERB there/ADV[| too].",
        "there/ADV {x?:agent} [met|saw] {y:friend}.",
        "{x?:agent} was/VERB with {y:friend}.",
        "[soon|then] {x?:agent} saw {x.his:agent} friend {y:friend}.",
        "{y:friend} [saw|met] {x:agent} {p.at} {p}.",
        "{x?:agent} was/VERB very {f} when {x.he:agent} saw {y:friend}.",
        "{x?:agent} asked {y:friend} to/PART play.",
    ),
    "meet_new": (
        "[the next/ADJ day|the next/ADJ morning|later], {x:agent} met a {y.girl:friend} named {y:friend} {p.at} {p}.",
        "[the next/ADJ day|later], {x:agent} [met|saw] {x.his:agent} friend {y:friend} {p.at} {p}.",
    ),
    # in between: what changes nothing, about nobody, one of them or both
    "animal": (
        "<perhaps_then> <both> saw a [small|little|brown|funny|white] {n}.",
        "<perhaps_then> {x:agent} saw a [small|little|brown|funny] {n}.",
        "a [small|brown|little] {n} [went by/ADV|ran to {x:friend} and {y:friend}|came to/ADP {p}].",
    ),
    "fun": (
        "<perhaps_then> <both> had/VERB [a lot of|so much/ADJ] fun.",
        "<both> [laughed|talked|played] and [danced|sang|jumped].",
        "<perhaps_then> <both> [played a game|sang a song|told a story|sat down/ADV|laughed|had/VERB lunch].",
        "<both> [walked|talked|played|sat] [for a long time|for a while/NOUN|together|there/ADV].",
        "for a [long time|while/NOUN], <both> [walked|talked|played|sat there/ADV].",
        "<both> were/VERB [very|so] {f}.",
        "[{p}|it] was a good [place/NOUN|day] for {x:member} and {y:member}.",
        "<perhaps_then> <both> drank a [bottle|glass] of [milk|water].",
    ),
    "place_is": (
        "{p} was [very|so|] [big|quiet|beautiful|lovely].",
        "there were [some|no|many/ADJ] [people|birds|flowers] {p.at} {p}.",
        "it was [a good day|warm|very quiet|late].",
    ),
    "like_place": ("{x?:experiencer} [liked|loved] {p}.", "<both> [liked|loved] {p}."),
    "smile": (
        "<perhaps_then> {x?:agent} [smiled|laughed|sat down/ADV|danced|sang a song|jumped up/ADV and down/ADV].",
        "{x?:agent} was/VERB <very> {f}.",
        "{x:agent} [liked|loved] to/PART [play|sing|dance|read].",
        "{x?:agent} [drank some|had/VERB some] [milk|water|bread].",
        "{x:agent} was/VERB a [good|kind] friend.",
    ),
    # one of them turns to the other
    "greet": (
        *("<before> {g:speaker} [said hello|waved|talked|said something] to {r:listener}.",) * 2,
        *("<before> {g:agent} [ran|walked|went|came] [over|back|up/ADV|] to {r:friend}.",) * 2,
        "<before> {g:agent} [smiled|waved|looked|laughed] at {r:friend}.",
        "<before> {g:agent} [played|danced|talked|walked|sat|laughed|sang] with {r:friend}.",
        "<before> {g:agent} [sat|stood] next to {r:friend}.",
        "<before> {g:agent} [hugged|helped|followed] {r:friend}.",
        "{g:experiencer} was/VERB <very> {f} to/PART [see|help|play with/ADV] {r:friend}.",
        "<before> {g:agent} gave a [hug|kiss|smile/NOUN] to {r:friend}.",
        "<before> {g:agent} [told a story|sang a song] [to|for] {r:friend}.",
        "<before> {g:agent} [wanted|asked|went|came] to/PART [play|talk/VERB|sit/VERB|walk/VERB] with {r:friend}.",
        "<before> {g:agent} [was/VERB [nice|kind|good]|listened] to {r:friend}.",
    ),
    "call": (
        '"{r:listener}, [look at|come to] {p}!" said {g:speaker}.',
        '"hello, {r:listener}," said {g:speaker}.',
        '"{r:listener}, can {g.I:speaker} play with {r.you:listener}?" asked {g:speaker}.',
        '{g:speaker} said to {r:listener}, "{g.I:speaker} [like|love] {p}."',
        '{g:speaker} said, "{r:listener}, {r.you:listener} are/VERB [good|kind|funny]."',
        '"look, {r:listener}!" [said|called] {g:speaker}.',
        '"come and play, {r:listener}!" [said|called] {g:speaker}.',
    ),
    "ask_play": (
        "<perhaps_then> {g:speaker} asked {r:listener} to/PART [play|dance|sing|draw|come] [with {g.him:speaker}|].",
    ),
    # having and finding things
    "have": (
        "<perhaps_then> {x?:owner} [had/VERB|was/VERB holding|brought|carried|got|took] {o}.",
        "<perhaps_then> {x:owner} had/VERB {o} with {x.him:owner}.",
        "<perhaps_then> {x:owner} had/VERB {o} in {x.his:owner} [hand|pocket].",
    ),
    "have_each": (
        "<perhaps_then> {x:owner} had/VERB {o}[,|] and {y:owner} had/VERB {q}.",
        "{x:owner} [brought|had/VERB] {o}, but {y:owner} [brought|had/VERB] {q}.",
    ),
    "buy": ("<perhaps_then> {x?:owner} bought {o}.",),
    "find_new": (
        "<perhaps_then> {x?:finder} found {o} {s.under} {s}.",
        "<perhaps_then> {x:finder} [found|saw and took] {o}.",
    ),
    "lies": (
        "there was {o} {s.under} {s}.",
        "<perhaps_then> <both> saw {o} {s.under} {s}.",
        "<perhaps_then> {x?:agent} saw {o} {s.under} {s}.",
        "there was {o} {p.at} {p}.",
    ),
    "pick_up": ("<perhaps_then> {x?:holder} picked up/ADV {o}.", "{x?:holder} picked {o?} up/ADV."),
    # giving: the receiver is named
    "give": (
        "<before> {g:giver} <kindly> <gave> {o} to {r:recipient} <after_gift>.",
        "<before> {g:giver} <kindly> <gave> {o} to {r:recipient}.",
        "<before> {g:giver} <first_act> and <kindly> <gave> {o} to {r:recipient} <after_gift>.",
        "<before> {g:giver} [took|picked up/ADV|held up/ADV|got] {o} and <kindly> <gave> {o.it} to {r:recipient}.",
        "<perhaps_then> {r:friend} [wanted|liked|asked for] {o} <and_then> {g:giver} <gave> {o.it} to {r:recipient}.",
        "<before> {g:giver}, who/PRON was/VERB [kind|good|{f}], <gave> {o} to {r:recipient}.",
    ),
    "give_new": (
        "<before> {g:giver} [had/VERB|found|bought|made|brought|got] {o} and <kindly> <gave> {o.it} to {r:recipient}.",
        "<before> {g:giver} [found|bought|made|got|brought|had/VERB] {o} for {r:recipient} <after_gift>.",
        "<before> {g:giver} [found|bought|made|got] {o}, and [then|] {g:giver} <gave> {o.it} to {r:recipient}.",
    ),
    "give_meeting": (
        "<once> <when_pair> {g:giver} <gave> {o} to {r:recipient} <after_gift>.",
        "<once> <with_friend> <and_then> {g:giver} <gave> {o} to {r:recipient}.",
        "<once> <pair> <pair_went> <and_then> {g:giver} <gave> {o} to {r:recipient} <after_gift>.",
        "{p.at} {p}, {x:member} [met|saw] {y:member}, and {g:giver} <gave> {o} to {r:recipient}.",
    ),
    "give_it": ("<before> {g:giver} <kindly> <gave> {o.it} to {r:recipient} <after_gift>.",),
    "give_back": (
        "<before> {g:giver} <kindly> [gave|handed|passed|brought|took] [{o}|{o}|{o.it}] back to {r:recipient}.",
    ),
    "give_pronoun": ("<perhaps_then> {g.he:giver} <kindly> <gave> {o} to {r:recipient}.",),
    "give_double": (
        "<perhaps_then> {g:giver} [gave|handed|offered] {r:recipient} {o}.",
        "<perhaps_then> {g:giver} gave {r.him:recipient} {o}.",
    ),
    "lend": ("<before> {g:giver} [lent|lent|sent] {o} to {r:recipient}.",),
    "sell": ("<before> {g:giver} sold {o} to {r:recipient}.",),
    "throw": ("<before> {g:giver} [threw|kicked|rolled] {o?} to {r:recipient}.",),
    "want_give": ("<perhaps_then> {g:owner} wanted to/PART [give|hand/VERB|show] {o} to {r:listener}.",),
    "treat": (
        "<before> {g:agent} <kindly> <gave> [some [milk|water|bread]|a [bottle|glass] of [milk|water]] to {r:friend}.",
    ),
    "show": (
        "<before> {g:presenter} [showed|showed|wanted to/PART show] {o?} to {r:viewer}.",
        "<before> {g:presenter} showed {r:viewer} {o}.",
    ),
    "read_to": ("<before> {g:presenter} read {o?} [to|to|for] {r:viewer}.",),
    "share": ("<before> {g:owner} [shared|played with|looked at] {o?} with {r:friend}.",),
    # thanks and speech
    "thank": (
        "<perhaps_then> {x:speaker} thanked {y:listener}.",
        "{x:speaker} [smiled|laughed|sat down/ADV] and thanked {y:listener}.",
        "{x:speaker} wanted to/PART thank {y:listener}.",
    ),
    "thank_for": (
        "<perhaps_then> {x:speaker} <kindly> thanked {y:listener} for {o}.",
        "{x:speaker} smiled and thanked {y:listener} for {o}.",
        '"thank {y.you:listener} for {o}, {y:listener}," said {x:speaker}.',
        "{x:speaker} was/VERB very {f} and thanked {y:listener} for {o}.",
    ),
    "thank_quote": (
        '"thank {y.you:listener}[| so much/ADV][|, {y:listener}]," said {x:speaker}.',
        '{x:speaker} said, "thank {y.you:listener}, {y:listener}."',
        '"{y:listener}, {y.you:listener} are/VERB so kind," said {x:speaker}.',
    ),
    "reply": ('"{x.you:listener} are/VERB welcome," said {y:speaker}.',),
    "say_like": ('"{x.I:speaker} [like|love] {o}," said {x:speaker}.',),
    "say_to": (
        '{g:speaker} said to {r:listener}, "{g.I:speaker} like {o}."',
        '"{r:listener}, {g.I:speaker} like {o}," said {g:speaker}.',
        "{g:speaker} talked to {r:listener} about {o}.",
    ),
    "ask_like": (
        '"do/AUX {y.you:listener} like {o}?" asked {x:speaker}.',
        '"{y:listener}, do/AUX {y.you:listener} like {o}?" asked {x:speaker}.',
    ),
    "answer_like": ('"yes, {y.I:speaker} [do/VERB|like {o.it}|love {o.it}]," said {y:speaker}.',),
    "ask_for": (
        "<perhaps_then> {x:speaker} asked {y:listener} for {o}.",
        "<perhaps_then> {x?:speaker} wanted {o}.",
        "{x:speaker} wanted to/PART [play with/ADV|hold|see|have] {o}.",
        "<perhaps_then> {x:speaker} asked {y:listener} to/PART [bring|give|show] {x.him:speaker} {o}.",
    ),
    "ask_quote": (
        '"can {x.I:speaker} [have|see|hold] {o}, please?" asked {x:speaker}.',
        '"{y:listener}, can {x.I:speaker} [have|see|hold] {o}?" asked {x:speaker}.',
    ),
    "answer_yes": ('"yes, {x.you:listener} can," said {y:speaker}.', '"of course/ADV," said {y:speaker}.'),
    "say_want": (
        "{x:speaker} [said that/SCONJ|cried/VERB because] {x.he:speaker} wanted {o}.",
        "{x:speaker} came over because {x.he:speaker} wanted {o}.",
    ),
    # feelings and reasons: a pronoun for the subject of the clause before
    "say_need": (
        "<perhaps_then> {x:speaker} [said|thought|knew] [that/SCONJ|] {x.he:speaker} was/VERB [very|so|] {f}.",
        *("<perhaps_then> {x:speaker} [told|said to] {y:listener} that/SCONJ {x.he:speaker} was/VERB <very> {f}.",) * 2,
        "<perhaps_then> {x:agent} sat [{p.at} {p}|with {y:friend}|there/ADV] until {x.he:agent} was/VERB {f}.",
        "<perhaps_then> {x:experiencer} was/VERB {f}, so {x.he:agent} [sat down/ADV|went home/ADV|rested|stopped].",
        "<perhaps_then> {x:agent} [sat down/ADV|stopped|rested] because {x.he:experiencer} was/VERB {f}.",
        "<perhaps_then> {x:experiencer} was/VERB {f}, but {x.he:agent} [was/VERB brave|smiled|did not/PART stop/VERB].",
        "<perhaps_then> {x:agent} [played|walked|ran] until {x.he:experiencer} was/VERB {f}.",
        "<perhaps_then> {x:agent} [sat down/ADV|rested] when {x.he:experiencer} was/VERB {f}.",
        "<perhaps_then> {x:agent} was/VERB so {f} that/SCONJ {x.he:agent} [sat down/ADV|went home/ADV|rested|stopped].",
    ),
    "feel_place": (
        "<perhaps_then> {x:experiencer} was/VERB <very> {f} because {x.he:experiencer} [liked|loved] {p}.",
        "<perhaps_then> {x:experiencer} [smiled|laughed|sang|danced] because {x.he:experiencer} [liked|loved] {p}.",
        "{x:experiencer} was/VERB <very> {f} when {x.he:experiencer} [saw|came to/ADP] {p}.",
        "{x:experiencer} said that/SCONJ {x.he:experiencer} [liked|loved] {p}.",
        "<perhaps_then> {x:experiencer} told {y:listener} that/SCONJ {x.he:experiencer} [liked|loved] {p}.",
        "{x:experiencer} [liked|loved] {p} so much/ADV that/SCONJ {x.he:agent} [danced|sang|laughed|was/VERB {f}].",
        "<perhaps_then> {x:experiencer} [smiled|laughed] because {x.he:experiencer} was/VERB {f}.",
        "<perhaps_then> {x:experiencer} [smiled|laughed] when {x.he:experiencer} saw {y:friend}.",
        "{x:experiencer} liked {y:friend} and said that/SCONJ {x.he:experiencer} was/VERB {f}.",
        "{x:experiencer} [wanted to/PART stay/VERB|ran to {p}], [so|and|but] {x.he:experiencer} was/VERB {f}.",
    ),
    "feel": ("<perhaps_then> {x?:experiencer} [was/VERB|felt] [very|so|] {f}.",),
    "feel_has_new": (
        "<perhaps_then> {x:experiencer} was/VERB <very> {f} because {x.he:owner} had/VERB {o}.",
        "{x:experiencer} [smiled|laughed|danced] because {x.he:owner} had/VERB {o}.",
        "{x:experiencer} was/VERB {f} when {x.he:owner} [found|got] {o}.",
        "{x:owner} said that/SCONJ {x.he:owner} had/VERB {o}.",
    ),
    "feel_has": (
        "{x:experiencer} was/VERB <very> {f} because {x.he:owner} had/VERB {o}.",
        "{x:experiencer} [smiled|laughed|danced] because {x.he:owner} had/VERB {o}.",
        "{x:owner} was/VERB {f} to/PART have {o}.",
    ),
    "feel_likes": (
        "{x:experiencer} was/VERB <very> {f} because {x.he:experiencer} [liked|loved] {o}.",
        "{x:experiencer} [smiled|laughed] when {x.he:experiencer} [saw|looked at] {o}.",
        "{x:experiencer} said that/SCONJ {x.he:experiencer} [liked|loved] {o}.",
        "{x:experiencer} [liked|loved] {o} so much/ADV that/SCONJ {x.he:agent} [danced|sang|laughed|was/VERB {f}].",
    ),
    "feel_lost": (
        "{x:experiencer} was/VERB <very> {f} because {x.he:loser} had lost {o}.",
        "{x:experiencer} was/VERB <very> {f} when {x.he:loser} could not/PART find {o}.",
    ),
    # using things
    "use_ball": ("<perhaps_then> {x?:agent} [played with|ran with] {o?}.", "{x?:agent} held {o?} up/ADV."),
    "use_toy": ("<perhaps_then> {x?:agent} [played with|looked at] {o?}.",),
    "use_food": ("<perhaps_then> {x?:agent} looked at {o?}.", "{x?:agent} [liked|loved] {o?}."),
    "use_reading": ("<perhaps_then> {x?:agent} [read|looked at] {o?}.",),
    "use_clothing": ("{x?:agent} [tried|put] on/ADV {o}.", "<perhaps_then> {x?:agent} looked at {o?}."),
    "use_thing": ("<perhaps_then> {x?:agent} [looked at|liked|loved|held] {o?}.",),
    "bag": ("<perhaps_then> {x?:agent} put {o?} in {x.his:owner} pocket.",),
    "play_with": ("<perhaps_then> <both> played with {o?}[| for a long time| together].",),
    "share_food": ("<perhaps_then> <both> [shared|ate] {o?} together.",),
    # losing, seeking, finding, mending
    "lose": ("[then|but then|later] {x:loser} lost {o}.", "<then> {x:loser} dropped {o} and {o.it} was/VERB gone."),
    "not_find": (
        "{x?:seeker} [could not/PART find|looked for] {o?}.",
        "{x:seeker} looked for {o?}, but {x.he:seeker} could not/PART find {o.it}.",
    ),
    "look_for": ("<both> looked for {o?} [everywhere|for a long time].",),
    "ask_where": ("{y:speaker} asked {x:listener} where {o} was/VERB.",),
    "tell_lost": (
        '"{x.I:speaker} lost {o}," said {x:speaker}.',
        "{x:speaker} told {y:listener} that/SCONJ {o} was/VERB gone.",
        "{x:speaker} [told {y:listener}|said] that/SCONJ {x.he:speaker} had lost {o}.",
    ),
    "offer_help": (
        '"{y.I:speaker} can help {x.you:listener}," said {y:speaker}.',
        '"do/AUX not/PART be/VERB sad," said {y:speaker}[| to {x:listener}].',
        '"{x:listener}, {y.I:speaker} can help {x.you:listener}," said {y:speaker}.',
    ),
    "find": (
        "<perhaps_then> {y:finder} found {o} {s.under} {s}.",
        "{y:finder} looked {s.under} {s} and found {o}.",
        "{y:finder} found {o?} {s.under} {s}.",
        "{y:finder} smiled because {y.he:finder} had found {o}.",
    ),
    "tell_found": ("{y:speaker} told {x:listener} that/SCONJ {o} was/VERB {s.under} {s}.",),
    "take": ("<perhaps_then> {y:finder} [picked up/ADV|took] {o}.", "<perhaps_then> {y:finder} [took|got] {o?}."),
    "breaks": ("[then|but then|suddenly,] {o} broke.", "{o} was/VERB broken."),
    "mend": ("{y?:helper} fixed {o?}.", "{y?:helper} [quickly|carefully|soon] fixed {o?}."),
    # endings
    "go_home": (
        "[in the evening|at the end of the day|after that/PRON], {x:member} and {y:member} went home/ADV[| together].",
        "<then> <both> went home/ADV[| together].",
        "it was/VERB late, so {x:member} and {y:member} went home/ADV.",
        "{x:agent} went home/ADV with {y:friend}.",
    ),
    "best_friends": (
        "{x:member} and {y:member} were/VERB [best|good|great] friends.",
        "<both> were/VERB [good|great] friends now.",
        "everyone liked {x:member} and {y:member}.",
    ),
    "good_day": (
        "it was a [good|great|wonderful|beautiful] day.",
        "it was a [good|great|wonderful] day for {x:member} and {y:member}.",
    ),
    "from_then": ("from that day on/ADV, <both> [played|laughed|sang] together every day.",),
    "dream": ("that night, {x:experiencer} dreamed of {o}.",),
    "sleep": (
        "that night, {x:experiencer} slept well.",
        "that night, {x:experiencer} slept well because {x.he:experiencer} was/VERB happy.",
    ),
    "lesson": ("<both> learned that/SCONJ [sharing/VERB|helping/VERB] is/VERB good.",),
    "happy_end": ("<both> were/VERB [very|so] {f}.",),
}
"""Every sentence pattern by name, with its templates."""

HELD_OUT_PATTERNS: dict[str, tuple[str, ...]] = {
    # two people come in
    "held_out_meeting": (
        "near {p}, {x:member} and {y:member} sat and talked.",
        "then there were {x:member} and {y:member}, {p.at} {p}.",
        "{x:member} saw {p}, and then {y:member} saw {p} too.",
        "{p} was quiet when {x:member} came, but then {y:member} came too.",
        "with {x.his:member} friend {y:member}, {x:member} walked to {p}.",
        "they were {x:member} and {y:member}, and they liked {p}.",
    ),
    # giving
    "held_out_give": (
        "for a while/NOUN {g:giver} looked at {o}, but in the end {g:giver} <kindly> <gave> {o.it} to {r:recipient}.",
        "still smiling, {g:giver} ran to find {o} and [handed|gave] {o.it} to {r:recipient}.",
        "there/ADV {g:giver} stopped, smiled and <gave> {o} to {r:recipient}.",
        "on the way home/ADV, {g:giver} thought it was time to/PART [give|hand/VERB|show] {o} to {r:recipient}.",
        "{o} was in the hand of {g:giver}, who/PRON <gave> {o.it} to {r:recipient}.",
        "in the evening it was {g:giver} who/PRON <kindly> <gave> {o} to {r:recipient}.",
    ),
    # a pronoun for the subject
    "held_out_pronoun": (
        "as they walked home/ADV, {x:speaker} called that/SCONJ {x.he:speaker} was/VERB {f}.",
        "{x:experiencer} did not/PART stop/VERB until {x.he:experiencer} was/VERB {f}.",
        "{x:experiencer} thought about {p} until {x.he:experiencer} was/VERB {f}.",
        "{x:experiencer} smiled at {p}, for/SCONJ {x.he:experiencer} was/VERB {f}.",
    ),
    # an object that was given is named again
    "held_out_object": (
        "for a long time {r:agent} sat and looked at {o}.",
        '{r:agent} said, "{r.I:speaker} can keep {o}."',
        "at home/ADV, {r:agent} told a story about {o}.",
        "that/DET night, {r:agent} slept next to {o}.",
    ),
    # two names, named before
    "held_out_again": (
        "it was a good story, and everyone was happy for {x:member} and {y:member}.",
        "the birds were singing/VERB when {x:member} and {y:member} came back.",
        "the next/ADJ day was a good day, because {x:member} and {y:member} played again.",
        "so it was that/SCONJ {x:member} and {y:member} played together.",
    ),
}
"""Sentences of the same words that no story holds: what a model does with them it has not learnt by heart."""

ROLES = (
    *("none", "protagonist", "friend", "member", "group", "agent", "experiencer", "giver", "recipient", "owner"),
    *("holder", "loser", "seeker", "finder", "helper", "presenter", "viewer", "speaker", "listener"),
    *("object", "property", "place", "spot", "animal", "feeling", "action"),
)
REFERENTS = (
    *("none", "character-0", "character-1", "character-2", "group"),
    *("object-0", "object-1", "object-2", "object-3", "place-0", "place-1", "place-2", "spot", "animal"),
)
LABELS: dict[str, tuple[str, ...]] = {
    "role": ROLES,
    "referent": REFERENTS,
    "pattern": tuple(PATTERNS),
    "pos": PARTS_OF_SPEECH,
}
"""Every value that each label of a word can take."""


@cache
def trees(pattern: str) -> tuple[Node, ...]:
    """The templates of a pattern, held out or not, ready to be drawn from."""
    return tuple(parse(template, _fragment) for template in (PATTERNS | HELD_OUT_PATTERNS)[pattern])


@cache
def _fragment(name: str) -> Choice:
    return Choice(tuple(parse(template, _fragment) for template in FRAGMENTS[name]))


@cache
def vocabulary() -> frozenset[str]:
    """Every word that can occur in a story, as it is written there; without punctuation marks."""
    words = set(NAMES) | set(KIND_OF) | {adjective for words in ADJECTIVES.values() for adjective in words}
    words |= {"a", "an", "the"}
    words |= {spot.under for spot in (*OUTDOOR_SPOTS, *INDOOR_SPOTS)} | {place.at for place in PLACES}
    words |= {
        entity[0] for kind in (PLACES, OUTDOOR_SPOTS, INDOOR_SPOTS, ANIMALS, GLAD, PROUD, SAD, NEEDY) for entity in kind
    }
    for piece, capital in {pair for pattern in PATTERNS for tree in trees(pattern) for pair in pieces_of(tree)}:
        if piece.var in tuple(CHARACTERS):
            texts = (
                {getattr(character(name), piece.text) for name in ("Lily", "Tom")} if piece.text != "name" else set()
            )
        elif piece.var in tuple(OBJECTS):
            texts = {piece.text}
        elif piece.text == "at":
            texts = {place.at for place in PLACES}
        else:
            texts = {"the"} if piece.text == "the" else set() if piece.var else {piece.text}
        words |= {text[0].upper() + text[1:] if capital else text for text in texts if text != "'s"}
    return frozenset(words)
