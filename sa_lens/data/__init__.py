"""Text, tokenizers, tokens on disk, and the order in which they are seen."""

from sa_lens.data.batches import BlockDataset, BlockOrder, ProcessPositions, training_loader
from sa_lens.data.cache import fingerprint
from sa_lens.data.hub import HubUnreachable
from sa_lens.data.preparation import PreparedData, prepare
from sa_lens.data.tokenizers import load_tokenizer
from sa_lens.data.tokens import TokenFile, validation_blocks

__all__ = [
    "BlockDataset",
    "BlockOrder",
    "HubUnreachable",
    "PreparedData",
    "ProcessPositions",
    "TokenFile",
    "fingerprint",
    "load_tokenizer",
    "prepare",
    "training_loader",
    "validation_blocks",
]
