"""Prompts in the words of the generated stories but in sentences that no pattern holds, written by hand.

`{A}` and `{B}` are names, `{O}` and `{Q}` objects, `{P}` a place. The answer is A in `ioi` and `repeated` (wrong: B), O
in `object` (wrong: Q, or an object not named), and the pronoun of A in `pronoun` (B is of the other gender).
"""

from __future__ import annotations

import random
from typing import NamedTuple

from sa_lens.data.stories import NAMES, held_out_pairs
from sa_lens.data.stories.words import KIND_OF, PLACES, character

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "ioi": (
        "When {A} and {B} were at the {P} one day, {B} kindly gave the {O} to",
        "{A} and {B} were both playing in the {P} after school. Then {B} decided to give a {O} to",
        "After school, {B} saw {A} sitting near the {P}, so {B} stopped and handed the {O} to",
        "{A} was so happy that {B} came to play! Later that day, {B} gave a big {O} to",
        "The day was warm. {A} and {B} went back to the {P}, where {B} found a {O} and gave it to",
        "{B} had a {O} that {A} liked. {B} smiled and gave the {O} to",
        "{A} and {B} are good friends. Today {B} wanted to give a {O} to",
        "Once there were two children near the {P}. They were named {A} and {B}. One day, {B} gave a {O} to",
        "{A} lost a {O}. {B} found it under a tree and gave it back to",
        "At the {P} there was a {O}. {A} saw it, but {B} took it. In the end {B} gave it to",
        "It was late in the evening. {A} was tired and {B} was hungry. Still, {B} handed the {O} to",
        "{B} met {A} in the morning. They talked about a {O}. In the afternoon {B} brought the {O} to",
        "{A}, {B} and a little dog went to the {P}. {B} threw the {O} to",
        "Look! {A} and {B} are at the {P}. Now {B} can give the {O} to",
        "{A} said hello. {B} said hello too. Then {B} passed the {O} to",
        '"Can I have the {O}?" asked {A}. "Yes, of course," said {B}, and {B} gave the {O} to',
        "While {A} sat under a tree, {B} walked around the {P}. Soon {B} came back and gave a {O} to",
        "Because it was a sunny day, {B} and {A} walked to the {P}, and there {B} offered a {O} to",
        "{A} was at home. {B} went to the shop and bought a {O}. Then {B} came home and gave it to",
        "{A} liked {B} very much, and {B} liked {A} too. So {B} made a {O} for",
        "Last night, {B} dreamed of {A}. The next morning, {B} took a {O} to",
        "{B} told {A} a funny story. After the story, {B} showed a {O} to",
        "In the {P}, {A} sang a song and {B} danced. When the song was over, {B} gave some flowers to",
        "{A} played with the {O}. {B} wanted to play too, but in the end {B} gave it back to",
        "Every morning {A} walked to school with {B}. One morning, {B} brought a {O} and showed it to",
        "{B} was kind. {B} saw that {A} was sad, so {B} gave a {O} to",
        "There was a big {O} in the {P}, and {A} wanted it. {B} picked it up and handed it to",
        "The children, {A} and {B}, looked for the {O} in the {P}. {B} found the {O} and brought it to",
        "{A} helped {B} every day. {B} wanted to thank {A}, so in the evening {B} bought a {O} for",
        "At lunch, {A} sat with {B} at the table. {B} was not hungry, so {B} passed the {O} to",
        "{B} did not like the {O}, but {A} loved it. So {B} sold it to",
        "{B} and {A} ran around the {P} until they were tired. Then they sat down, and {B} gave a drink to",
    ),
    "object": (
        "{A} and {B} were at the {P}. {A} gave a {O} to {B}. Then {B} said, thank you for the",
        "{A} found a {O} near the {P} and put it in a bag. At home, {A} looked at the",
        "{B} wanted a {O}. {A} bought it in a shop, and soon {B} played with the",
        "{A} had a {O} and {B} had a {Q}. {A} lost the {O}. For a long time {A} and {B} looked for the",
        '{A} brought a {O} to school. "Look!" said {A}. "I have a {O}!" Everyone wanted to see the',
        "One night {A} dreamed of a {O}. In the morning, {A} told {B} about the",
        "{B} saw a {Q} in the shop but bought a {O}. At home {B} was very happy with the",
        "There was a {O} under a tree. {A} saw it and picked up the",
        '{A} took a {O} to the {P} and showed it to {B}. "I love it!" said {B}. So {A} gave {B} the',
        "{B} was sad because the {O} was broken. {A} was kind and fixed the",
    ),
    "pronoun": (
        "{A} and {B} walked home. {A} was so tired that",
        "{A} lost a {O} at the {P}. That day {A} was very sad because",
        "{B} was at home. In the morning, {A} told {B} that",
        "{A} sat under a tree with a book and read until",
        "{A} did not go to school because",
        "{A} liked to sing. One day {A} sang so well that",
        "{A} walked and walked. At last {A} stopped because",
        "{A} came to the {P} and sat down there because",
        "When {A} came home, {A} was happy because",
        "At the {P}, {B} saw {A}. {A} waved and laughed because",
        "It was a good {O}, and {A} loved it so much that",
    ),
    "repeated": (
        "Long ago {B} and {A} lived in a house near the {P}. Every day, {B} and",
        "{A} met {B} at the {P}. They had lunch together. After lunch {B} and",
        "{B} is a good friend of {A}. Today {B} and",
        "{A} and {B} went to the {P}. It was cold, so they came back. Now both {B} and",
        "The sun was warm. {B} and {A} sat under a tree. A bird sang for {B} and",
        "{B} came home with {A}. Everyone was glad to see {B} and",
        "It was a great day for {A} and {B}. In the evening, the children, {B} and",
        "{A} was sad, and {B} was sad too. Then {B} hugged {A}. So {B} and",
        '"Come and play!" said {A}. "Yes!" said {B}. And so {B} and',
    ),
}
CLASSICS: dict[str, tuple[str, ...]] = {
    "ioi": (
        "{A} and {B} went to the {P}. {B} gave the {O} to",
        "{A} and {B} were playing in the {P} after school. Then {B} decided to give a {O} to",
        "When {A} and {B} went to the {P}, {B} gave a {O} to",
        "When {A} and {B} got a {O} at the {P}, {B} decided to give it to",
        "Then, {A} and {B} went to the {P}. {B} gave a {O} to",
        "Then, {A} and {B} had a lot of fun at the {P}. {B} gave a {O} to",
        "Then, {A} and {B} were working at the {P}. {B} decided to give a {O} to",
        "Then, {A} and {B} were thinking about going to the {P}. {B} wanted to give a {O} to",
        "Then, {A} and {B} had a long talk, and afterwards {B} said to",
        "After {A} and {B} went to the {P}, {B} gave a {O} to",
        "While {A} and {B} were working at the {P}, {B} gave a {O} to",
        "The {P} {A} and {B} went to had a {O}. {B} gave it to",
        "Friends {A} and {B} found a {O} at the {P}. {B} gave it to",
    )
}
"""What people type first when they try a model on indirect objects; a story may hold some of these sentences."""


class Paraphrase(NamedTuple):
    """A prompt with the next word and a wrong one, both with their leading space."""

    prompt: str
    answer: str
    wrong: str


def fill(task: str, template: str, n: int, seed: int = 0) -> list[Paraphrase]:
    """n prompts of a template, with names that never meet in a story."""
    rng = random.Random(f"{template}/{seed}")
    pairs = sorted(tuple(sorted(pair)) for pair in held_out_pairs())
    if task == "pronoun":
        pairs = [pair for pair in pairs if NAMES[pair[0]] != NAMES[pair[1]]]
    prompts = []
    for _ in range(n):
        a, b = rng.sample(rng.choice(pairs), 2)
        # `a apple` is no English
        o, q = rng.sample([noun for noun in KIND_OF if noun[0] not in "aeiou"], 2)
        words = {"A": a, "B": b, "O": o, "Q": q, "P": rng.choice(PLACES).noun}
        answer, wrong = {"object": (o, q), "pronoun": (character(a).he, character(b).he)}.get(task, (a, b))
        prompts.append(Paraphrase(template.format(**words), f" {answer}", f" {wrong}"))
    return prompts
