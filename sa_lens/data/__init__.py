"""Text, tokenizers, tokens on disk, and the order in which they are read.

| name | what it answers | cost |
|---|---|---|
| `prepare`, `PreparedData` | from a `DataConfig` to tokenizer and token files, in the cache | encodes a text once |
| `stories` | generated stories in which the label of every word is known | thousands per second |
| `TokenFile`, `write_tokens` | a text as tokens on disk, memory-mapped; encodes one | |
| `TextBlocks`, `validation_blocks` | blocks of tokens of a text, for analyses and for the validation loss | |
| `load_tokenizer`, `train_bpe` | a tokenizer from a folder; a new one trained on a text | |
| `boundary_tokens`, `Boundaries` | the tokens at the beginning and the end of every text | |
| `training_loader`, `ProcessPositions`, `BlockOrder` | batches for training, addressed by step | |
| `open_source`, `Source` | documents of a file, a folder or a dataset on the Hub | |
| `DamagedFile`, `HubUnreachable` | errors | |
"""

from sa_lens.data import stories
from sa_lens.data.batches import BlockOrder, ProcessPositions, training_loader
from sa_lens.data.blocks import TextBlocks
from sa_lens.data.hub import HubUnreachable
from sa_lens.data.preparation import PreparedData, prepare
from sa_lens.data.sources import Source, open_source
from sa_lens.data.tokenizers import Boundaries, boundary_tokens, load_tokenizer, train_bpe
from sa_lens.data.tokens import TokenFile, validation_blocks, write_tokens
from sa_lens.data.whole_files import DamagedFile

__all__ = [  # noqa: RUF022 - in the order of the table
    "prepare",
    "PreparedData",
    "stories",
    "TokenFile",
    "write_tokens",
    "TextBlocks",
    "validation_blocks",
    "load_tokenizer",
    "train_bpe",
    "boundary_tokens",
    "Boundaries",
    "training_loader",
    "ProcessPositions",
    "BlockOrder",
    "open_source",
    "Source",
    "DamagedFile",
    "HubUnreachable",
]
