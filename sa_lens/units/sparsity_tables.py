"""How sparse weights, activations and connections are, by the paper's measure and by ones without a scale.

The paper's mean absolute weight counts every entry of the plain transformer, embedding and unembedding each (also
where they are tied), and changes with any rescaling that leaves the function as it is. Hoyer and Gini of a matrix do
not change when the matrix is rescaled, so for several matrices they are means over them. The share of entries below a
fraction of the layer's root mean square changes when matrices of one layer are rescaled against one another. Gates are
no part of the plain transformer and are left out, and so are biases that TransformerLens creates but the model lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
"""Measures of single matrices."""
EPS = 0.01
"""Share of a layer's root mean square below which a weight counts as absent."""


def sparsity(model: Host, eps: float = EPS) -> pd.DataFrame:
    """Sparsity of the weights of the plain transformer.

    Args:
        eps: a weight counts as small below `eps` times the root mean square of its layer's matrices (an embedding's:
            its own).

    Returns:
        A row a matrix, then `matrices` (all of them), `matrices without embeddings`, and `all parameters` (biases and
        LayerNorms too: the paper's figure is its `mean_abs`), `all parameters without embeddings`. Columns: weight,
        layer (-1 where none), n, mean_abs, hoyer, gini (of several matrices: means weighted by their entries),
        share_small; the last three are NaN for rows with biases.

    Raises:
        ValueError: eps not above 0.
    """
    import pandas as pd

    _check_eps(eps)
    matrices = _matrices(model)
    scales = layer_scales(model)
    each = {name: _row(name, layer, x, eps * scales[name]) for name, (layer, x) in matrices.items()}
    inner = [name for name in matrices if name not in EMBEDDINGS]
    parts = {"": list(matrices), " without embeddings": inner}
    means = [_mean_row(f"matrices{which}", [each[name] for name in names]) for which, names in parts.items()]
    vectors = {name: x for name in _vector_names(model) if (x := _weight_or_none(model, name)) is not None}
    inner_vectors = [x for name, x in vectors.items() if name != UNEMBEDDING_BIAS]
    whole = [
        _all_row(f"all parameters{which}", [*(matrices[name][1] for name in names), *others])
        for (which, names), others in zip(parts.items(), ([*vectors.values()], inner_vectors), strict=True)
    ]
    return pd.DataFrame([*each.values(), *means, *whole])


def activation_sparsity(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] | None = None,
    *,
    n_tokens: int | None = 100_000,
    eps: float = EPS,
    progress: bool = True,
) -> pd.DataFrame:
    """Sparsity of the units' values at each token: means over tokens of measures across the units of a layer.

    Args:
        streams: None: all that the model has.
        n_tokens: tokens to read at most; None: all.
        eps: a value counts as small below `eps` times the root mean square of the token's units.

    Returns:
        One row per stream and sublayer: n (units), hoyer, gini, share_zero, share_small; means over
        tokens. Tokens at which every unit is zero are left out of Hoyer and Gini.

    Raises:
        ValueError: eps not above 0, an unknown stream, a text that does not fit.
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


def effective_connections(model: Host, table: pd.DataFrame, eps: float = EPS) -> pd.DataFrame:
    """How many weights into and out of units count, by stream: those of live units, and those in use at a token.

    A weight counts if it is at least `eps` times its layer's root mean square. Weights of a unit are its column of
    W_in (and W_gate) and its row of W_out, or its column of W_V and its row of W_O.

    Args:
        table: from `specialization` of this model.

    Returns:
        One row per stream and sublayer, and one for `all` of a stream (layer -1): weights, not_small,
        live (of these, weights of live units), firing (expected at a token: each unit's weights times its firing
        rate), live_share and firing_share of all weights.

    Raises:
        ValueError: eps not above 0, or a table of another model.
    """
    import pandas as pd

    _check_eps(eps)
    if table.attrs.get("model") not in (None, fingerprint_of(model)):
        raise ValueError("the table is that of a model with other weights or gates: make this one's by specialization")
    scales = layer_scales(model)
    rows = []
    for stream in table["stream"].unique():
        of_stream = []
        for sublayer in unit_counts(model):
            per_unit, total = _weights_of_units(model, sublayer, scales, eps)
            of_sublayer = table[
                (table["stream"] == stream) & (table["layer"] == sublayer.layer) & (table["site"] == sublayer.site)
            ]
            of_sublayer = of_sublayer.sort_values("unit")
            if len(of_sublayer) != len(per_unit):
                raise ValueError(
                    f"the table has {len(of_sublayer)} units at {sublayer}, this model {len(per_unit)}: not its own"
                )
            live = torch.as_tensor(of_sublayer["live"].to_numpy(dtype=float, copy=True))
            rate = torch.as_tensor(of_sublayer["firing_rate"].to_numpy(dtype=float, copy=True))
            of_stream.append(
                {
                    "stream": stream,
                    **sublayer._asdict(),
                    "weights": total,
                    "not_small": float(per_unit.sum()),
                    "live": float(per_unit @ live),
                    "firing": float(per_unit @ rate),
                }
            )
        whole = {name: sum(row[name] for row in of_stream) for name in ("weights", "not_small", "live", "firing")}
        rows += [*of_stream, {"stream": stream, "layer": -1, "site": "all", **whole}]
    connections = pd.DataFrame(rows)
    connections["live_share"] = connections["live"] / connections["weights"]
    connections["firing_share"] = connections["firing"] / connections["weights"]
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
    """Layer (-1 for embeddings) and value of every matrix."""
    names = [(-1, name) for name in EMBEDDINGS]
    names += [(layer, f"blocks.{layer}.{name}") for layer in range(model.cfg.n_layers) for name in LAYER_MATRICES]
    return {name: (layer, x) for layer, name in names if (x := _weight_or_none(model, name)) is not None}


def _vector_names(model: Host) -> list[str]:
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in LAYER_VECTORS]
    lacking = getattr(model, "zero_biases", ())
    return [name for name in (*names, *END_VECTORS) if name not in lacking]


def layer_scales(model: Host) -> dict[str, float]:
    """Root mean square that each matrix is held against: of all matrices of its layer, or an embedding's own."""
    matrices = _matrices(model)
    groups: dict[int | str, list[Tensor]] = {}
    for name, (layer, x) in matrices.items():
        groups.setdefault(name if layer < 0 else layer, []).append(x)
    scale = {
        group: (
            sum(float(x.double().square().sum()) for x in matrices_of_group) / sum(x.numel() for x in matrices_of_group)
        )
        ** 0.5
        for group, matrices_of_group in groups.items()
    }
    return {name: scale[name if layer < 0 else layer] for name, (layer, _) in matrices.items()}


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


def _mean_row(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of the rows of matrices, weighted by their entries."""
    n = sum(row["n"] for row in rows)
    means = {key: sum(row["n"] * row[key] for row in rows) / n for key in ("mean_abs", *MEASURES)}
    return {"weight": name, "layer": -1, "n": n, **means}


def _all_row(name: str, weights: Sequence[Tensor]) -> dict[str, Any]:
    n = sum(x.numel() for x in weights)
    mean = sum(float(x.abs().double().sum()) for x in weights) / n
    return {"weight": name, "layer": -1, "n": n, "mean_abs": mean, **dict.fromkeys(MEASURES, float("nan"))}


def _weights_of_units(
    model: Host, sublayer: Sublayer, scales: Mapping[str, float], eps: float
) -> tuple[Float[Tensor, " unit"], int]:
    """Number of weights of each unit that are not small, and of all weights of the sublayer."""
    # the axes of each matrix that are not units: all but head and d_head, or all but d_mlp
    if sublayer.site == "attn":
        other_axes = {"attn.W_V": (1,), "attn.W_O": (2,)}
    else:
        other_axes = {"mlp.W_in": (0,), "mlp.W_gate": (0,), "mlp.W_out": (1,)}
    counts, total = [], 0
    for name, over in other_axes.items():
        full = f"blocks.{sublayer.layer}.{name}"
        x = _weight_or_none(model, full)
        if x is not None:
            counts.append((x.abs() >= eps * scales[full]).sum(over).flatten())
            total += x.numel()
    return torch.stack(counts).sum(0).double().cpu(), total
