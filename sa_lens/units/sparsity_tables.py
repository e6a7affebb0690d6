"""How sparse weights, activations and connections are, by the paper's measure and by measures without a scale.

The paper's mean absolute weight is taken over every entry of the plain transformer, with the embedding and the
unembedding counted separately even if they are tied. It changes under rescalings that leave the function unchanged.
Hoyer and Gini of a matrix do not change when the matrix is rescaled; for several matrices they are means over the
matrices. The share of entries below a fraction of the layer's root mean square changes when the matrices of a layer are
rescaled relative to one another. Gates are not part of the plain transformer and are left out, as are biases that
TransformerLens creates but the model does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, at_least_float32, fingerprint_of, weight
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.statistics import gini, hoyer, hoyer_from_sums
from sa_lens.units.activations import chosen_streams, stream_units, text_blocks

if TYPE_CHECKING:
    import pandas as pd

EMBEDDINGS = ("embed.W_E", "pos_embed.W_pos", "unembed.W_U")
LAYER_MATRICES = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_gate", "mlp.W_out")
LAYER_VECTORS = (
    *("ln1.w", "ln1.b", "ln2.w", "ln2.b"),
    *("attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out"),
)
UNEMBEDDING_BIAS = "unembed.b_U"
END_VECTORS = ("ln_final.w", "ln_final.b", UNEMBEDDING_BIAS)
MEASURES = ("hoyer", "gini", "share_small")
"""Measures that are computed for each matrix and averaged over several."""
EPS = 0.01
"""Share of a layer's root mean square below which a weight counts as small."""


def sparsity(model: Host, eps: float = EPS) -> pd.DataFrame:
    """Measures how sparse the weights of the plain transformer are.

    Args:
        eps: a weight counts as small below `eps` times the root mean square of its layer's matrices; for an embedding,
            below `eps` times its own root mean square.

    Returns:
        One row per matrix, then `matrices` (all of them), `matrices without embeddings`, `all parameters` (with biases
        and LayerNorms; its `mean_abs` is the paper's measure) and `all parameters without embeddings`. Columns: weight,
        layer (-1 outside the layers), n (entries), mean_abs, hoyer, gini, share_small. The rows of several matrices
        hold means weighted by their entries; rows with biases have NaN in the last three columns.

    Raises:
        ValueError: eps is not above 0.
    """
    import pandas as pd

    _check_eps(eps)
    matrices, scales = _matrices(model), layer_scales(model)
    table = pd.DataFrame([_row(name, layer, x, eps * scales[name]) for name, (layer, x) in matrices.items()])
    inner = table[~table["weight"].isin(EMBEDDINGS)]
    vectors = {name: x for name in _vector_names(model) if (x := _weight_or_none(model, name)) is not None}
    inner_vectors = [x for name, x in vectors.items() if name != UNEMBEDDING_BIAS]
    rows = [
        _mean_row("matrices", table),
        _mean_row("matrices without embeddings", inner),
        _all_row("all parameters", [*(x for _, x in matrices.values()), *vectors.values()]),
        _all_row(
            "all parameters without embeddings", [*(matrices[name][1] for name in inner["weight"]), *inner_vectors]
        ),
    ]
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def activation_sparsity(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] | None = None,
    *,
    n_tokens: int | None = 100_000,
    eps: float = EPS,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures how sparse the values of a layer's units are at each token, and averages over tokens.

    Args:
        text: a token file, blocks `[block pos]`, or `TextBlocks`.
        streams: streams to read; None reads all that the model has.
        n_tokens: largest number of tokens to read; None reads all.
        eps: a value counts as small up to `eps` times the root mean square of the units at that token.
        progress: whether to show a progress bar.

    Returns:
        One row per stream and sublayer: n (units), hoyer, gini, share_zero, share_small, averaged over tokens. Hoyer
        and Gini leave out tokens at which every unit is zero.

    Raises:
        ValueError: eps is not above 0, the stream is unknown, or the text does not fit the model.
    """
    import pandas as pd

    _check_eps(eps)
    chosen = chosen_streams(model, streams)
    blocks = text_blocks(model, text, n_tokens)
    keys = [(stream, sublayer) for stream in chosen for sublayer in unit_counts(model)]
    sums = {key: torch.zeros(2, 4, dtype=torch.float64) for key in keys}
    widths = {}
    for batch in stream_units(model, blocks, chosen, progress=progress, name="activation sparsity"):
        for stream, sublayer in keys:
            x = batch.values[stream][sublayer].flatten(0, 1).T.float()
            widths[sublayer] = len(x)
            floor = eps * x.square().mean(0).sqrt()
            columns = [hoyer(x), gini(x), (x == 0).double().mean(0), (x.abs() <= floor).double().mean(0)]
            each = torch.stack([column.double() for column in columns])
            known = each.isfinite()
            sums[stream, sublayer][0] += torch.where(known, each, 0).sum(1).cpu()
            sums[stream, sublayer][1] += known.sum(1).cpu()
    rows = []
    for stream, sublayer in keys:
        values = (sums[stream, sublayer][0] / sums[stream, sublayer][1]).tolist()
        place = {"stream": stream, **sublayer._asdict(), "n": widths[sublayer]}
        rows.append(place | dict(zip(("hoyer", "gini", "share_zero", "share_small"), values, strict=True)))
    return pd.DataFrame(rows)


def effective_connections(model: Host, table: pd.DataFrame) -> pd.DataFrame:
    """Counts the weights into and out of live units, and the weights that are in use at a token, for each stream.

    Only weights of at least 1 % of their layer's root mean square count. The weights of a neuron are its column of
    W_in (and W_gate) and its row of W_out; those of an attention unit are its column of W_V and its row of W_O.

    Args:
        table: table of this model from `specialization(...).table`.

    Returns:
        One row per stream and sublayer, and one row `all` per stream (layer -1): weights (all of them), not_small, live
        (the weights of live units among these), firing (their expected number at a token: each unit's weights times its
        firing rate), and live_share and firing_share of all weights.

    Raises:
        ValueError: the table belongs to another model.
    """
    import pandas as pd

    if table.attrs.get("model") not in (None, fingerprint_of(model)):
        raise ValueError("the table is that of a model with other weights or gates: make this one's by specialization")
    scales, columns = layer_scales(model), ["weights", "not_small", "live", "firing"]
    rows: list[dict[str, Any]] = []
    for stream in table["stream"].unique():
        for sublayer in unit_counts(model):
            per_unit, total = _weights_of_units(model, sublayer, scales)
            units = table.query("stream == @stream and layer == @sublayer.layer and site == @sublayer.site")
            if len(units) != len(per_unit):
                raise ValueError(
                    f"the table has {len(units)} units at {sublayer}, but this model has {len(per_unit)}; give the "
                    "table of this model"
                )
            live, rate = units.sort_values("unit")[["live", "firing_rate"]].to_numpy(dtype=float).T
            counts = (total, per_unit.sum(), per_unit @ live, per_unit @ rate)
            rows.append({"stream": stream, **sublayer._asdict(), **dict(zip(columns, map(float, counts), strict=True))})
        of_stream = rows[-len(unit_counts(model)) :]
        totals = {name: sum(row[name] for row in of_stream) for name in columns}
        rows.append({"stream": stream, "layer": -1, "site": "all", **totals})
    connections = pd.DataFrame(rows).astype({"weights": int})
    for name in ("live", "firing"):
        connections[f"{name}_share"] = connections[name] / connections["weights"]
    return connections


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0: a share of the layer's root mean square, such as {EPS}")


def _weight_or_none(model: Host, name: str) -> Tensor | None:
    try:
        return at_least_float32(weight(model, name).detach())
    except ValueError:
        return None


def _matrices(model: Host) -> dict[str, tuple[int, Tensor]]:
    """Returns the layer (-1 for embeddings) and the value of every matrix."""
    names = [(-1, name) for name in EMBEDDINGS]
    names += [(layer, f"blocks.{layer}.{name}") for layer in range(model.cfg.n_layers) for name in LAYER_MATRICES]
    return {name: (layer, x) for layer, name in names if (x := _weight_or_none(model, name)) is not None}


def _vector_names(model: Host) -> list[str]:
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in LAYER_VECTORS]
    lacking = getattr(model, "zero_biases", ())
    return [name for name in (*names, *END_VECTORS) if name not in lacking]


def layer_scales(model: Host) -> dict[str, float]:
    """Returns the root mean square of all matrices of each matrix's layer, or that of an embedding itself."""
    matrices = _matrices(model)
    groups: dict[int | str, list[Tensor]] = {}
    for name, (layer, x) in matrices.items():
        groups.setdefault(name if layer < 0 else layer, []).append(x)
    scales = {
        group: (sum(float(x.double().square().sum()) for x in members) / sum(x.numel() for x in members)) ** 0.5
        for group, members in groups.items()
    }
    return {name: scales[name if layer < 0 else layer] for name, (layer, _) in matrices.items()}


def _row(name: str, layer: int, x: Tensor, floor: float) -> dict[str, Any]:
    absolute, squares = x.abs().double().sum(), x.double().square().sum()
    return {
        "weight": name,
        "layer": layer,
        "n": x.numel(),
        "mean_abs": float(absolute) / x.numel(),
        "hoyer": float(hoyer_from_sums(x.numel(), absolute, squares)),
        "gini": float(gini(x.flatten())),
        "share_small": int((x.abs() < floor).sum()) / x.numel(),
    }


def _mean_row(name: str, table: pd.DataFrame) -> dict[str, Any]:
    """Returns the means of the rows of matrices, weighted by their entries."""
    means = {column: np.average(table[column], weights=table["n"]) for column in ("mean_abs", *MEASURES)}
    return {"weight": name, "layer": -1, "n": table["n"].sum(), **means}


def _all_row(name: str, weights: Sequence[Tensor]) -> dict[str, Any]:
    n = sum(x.numel() for x in weights)
    mean = sum(float(x.abs().double().sum()) for x in weights) / n
    return {"weight": name, "layer": -1, "n": n, "mean_abs": mean, **dict.fromkeys(MEASURES, float("nan"))}


def _weights_of_units(
    model: Host, sublayer: Sublayer, scales: Mapping[str, float]
) -> tuple[Float[np.ndarray, " unit"], int]:
    """Returns how many weights of each unit are not small, and how many weights the sublayer has."""
    # the axes of each matrix other than its units (head and d_head, or d_mlp)
    if sublayer.site == "attn":
        other_axes = {"attn.W_V": (1,), "attn.W_O": (2,)}
    else:
        other_axes = {"mlp.W_in": (0,), "mlp.W_gate": (0,), "mlp.W_out": (1,)}
    counts, total = [], 0
    for name, over in other_axes.items():
        full = f"blocks.{sublayer.layer}.{name}"
        x = _weight_or_none(model, full)
        if x is not None:
            counts.append((x.abs() >= EPS * scales[full]).sum(over).flatten())
            total += x.numel()
    return torch.stack(counts).sum(0).double().cpu().numpy(), total
