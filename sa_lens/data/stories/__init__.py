"""Generated children's stories in which the label of every word is known.

`generate(n, seed)` yields stories; `story.words` labels each word with its role, referent, sentence pattern and part of
speech (all values: `LABELS`). `draw_prompts(task, n)` draws prompts cut from the same sentence patterns, with names
that never meet in a story when `pairs=held_out_pairs()`.
"""

from sa_lens.data.stories.patterns import HELD_OUT_PATTERNS, LABELS, PATTERNS, vocabulary
from sa_lens.data.stories.prompts import TASKS, Prompt, PromptTemplate, draw_prompts, prompt_templates
from sa_lens.data.stories.story import Story, Word
from sa_lens.data.stories.telling import generate
from sa_lens.data.stories.words import NAMES, held_out_pairs

__all__ = [
    "HELD_OUT_PATTERNS",
    "LABELS",
    "NAMES",
    "PATTERNS",
    "TASKS",
    "Prompt",
    "PromptTemplate",
    "Story",
    "Word",
    "draw_prompts",
    "generate",
    "held_out_pairs",
    "prompt_templates",
    "vocabulary",
]
