"""Tasks as pairs of prompts: built-in tasks, JSON files, and one's own texts or tokens."""

from sa_lens.circuits.tasks.builtin_tasks import (
    TASKS,
    ioi,
    make,
    make_unseen,
    object_recall,
    pronoun_gender,
    read_json,
    repeated_name,
)
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.drafts import Draft

__all__ = [
    "TASKS",
    "Draft",
    "PromptPairs",
    "ioi",
    "make",
    "make_unseen",
    "object_recall",
    "pronoun_gender",
    "read_json",
    "repeated_name",
]
