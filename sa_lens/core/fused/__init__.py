"""The two-stream loss without hooks, on the parameters of the same model, and the values of all units likewise.

    eligible_models.py          which models it can run (activation functions among them), and why not the others
    passes.py                   the two streams, layer by layer, to the loss terms
    two_stream_attention.py     attention of both streams over the clean keys, a block of queries at a time
    selection.py                the top-k mask with the closed-form gradient of its surrogate
    cross_entropy.py            unembedding and cross-entropy, a chunk of rows at a time
    linear_map.py               linear maps whose input is made again in the backward pass
    operations.py               tied embeddings, RMSNorm and gated neurons
    unit_values.py              losses, masks, and units of every layer, for statistics over many tokens

Each is the same function as its readable counterpart by hooks (`streams.py`, `gate.py`, `losses.py`), which the tests
hold it to. Nothing here waits for a GPU.
"""

from sa_lens.core.fused.eligible_models import why_not_fused
from sa_lens.core.fused.passes import fused_loss
from sa_lens.core.fused.unit_values import fused_losses_and_masks, fused_units, reads_fused

__all__ = ["fused_loss", "fused_losses_and_masks", "fused_units", "reads_fused", "why_not_fused"]
