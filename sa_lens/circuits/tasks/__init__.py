"""Tasks as pairs of prompts: built-in tasks, JSON files, and one's own texts or tokens."""

from sa_lens.circuits.tasks.builtin_tasks import (
    TASKS,
    World,
    ioi,
    make,
    make_unseen,
    object_recall,
    pronoun_gender,
    read_json,
    repeated_name,
)
from sa_lens.circuits.tasks.pairs import Draft, PromptPairs, encode, split

__all__ = [
    "TASKS",
    "Draft",
    "PromptPairs",
    "World",
    "encode",
    "ioi",
    "make",
    "make_unseen",
    "object_recall",
    "pronoun_gender",
    "read_json",
    "repeated_name",
    "split",
]
