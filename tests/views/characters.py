"""A tokenizer of single characters, some with a meaning in HTML, and caches of both streams."""

from __future__ import annotations

import torch

VOCABULARY = 20


class Characters:
    """A tokenizer whose tokens are single characters; some have a meaning in HTML, one is a whole tag."""

    bos_token_id = 0
    eos_token_id = 0
    padding_side = "right"
    texts = ("<|end|>", "<script>", "<", "&lt;", '"', "'", "\n", " ", "😀", "ש", *"abcdefghij")

    def encode(self, text, add_special_tokens=False):
        found = []
        while text:
            token = next(i for i, known in enumerate(self.texts) if text.startswith(known))
            found.append(token)
            text = text[len(self.texts[token]) :]
        return found

    def decode(self, tokens):
        return "".join(self.texts[token] for token in tokens)


EVIL = "<script>a\"'&lt;<b \n😀ש"
"""Text that a careless page would take for markup."""


TOKENS = torch.tensor([0, 5, 6, 7, 6, 11, 3])


def caches(model, tokens=TOKENS):
    """Caches of both streams, by TransformerLens's own means."""
    _, clean = model.run_with_cache(tokens[None])
    with model.ablated():
        _, ablated = model.run_with_cache(tokens[None])
    return {"clean": clean, "ablated": ablated}
