"""Generated children's stories in which the label of every word is known.

`generate(n, seed)` yields stories; `story.words` labels each word with its role, referent, sentence pattern and part of
speech.
"""

from sa_lens.data.stories.patterns import LABELS, PATTERNS
from sa_lens.data.stories.story import Story, Word
from sa_lens.data.stories.telling import generate
from sa_lens.data.stories.words import NAMES, held_out_pairs

__all__ = ["LABELS", "NAMES", "PATTERNS", "Story", "Word", "generate", "held_out_pairs"]
