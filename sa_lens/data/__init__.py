"""Text, tokenizers, tokens on disk, and the order in which they are seen."""

from sa_lens.data.batches import BlockDataset, ProcessPositions, training_loader
from sa_lens.data.disk import fingerprint
from sa_lens.data.hub import HubUnreachable
from sa_lens.data.order import BlockOrder
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
