"""Counts of a histogram are those of a loop over its values."""

import pytest
import torch
from characters import TOKENS, caches

from sa_lens.views import draw, histogram, unit_histogram
from sa_lens.views.records import from_json, to_json


def test_counts():
    values = {"a": [0.0, 0.5, 1.0, 2.0], "b": [2.0, 2.0]}
    record = histogram(values, "t", "x", bins=4)
    assert record.edges == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert [(one.name, one.counts) for one in record.series] == [("a", (1, 1, 1, 1)), ("b", (0, 0, 0, 2))]
    assert from_json(to_json(record)) == record
    figure = draw(record)
    assert [list(trace.y) for trace in figure.data] == [[1, 1, 1, 1], [0, 0, 0, 2]]
    assert figure.layout.yaxis.type == "log"
    for bad, words in (({}, "at least one"), ({"a": []}, "at least one"), ({"a": [float("nan")]}, "1 are not")):
        with pytest.raises(ValueError, match=words):
            histogram(bad, "t", "x")
    with pytest.raises(ValueError, match="bins=0"):
        histogram(values, "t", "x", bins=0)


def test_unit_in_both_streams(model, plain_model):
    blocks = torch.stack([TOKENS, TOKENS.flip(0)])
    record = unit_histogram(model, blocks, (1, "mlp", 7), bins=5)
    clean, kept = [], []
    for tokens in blocks:
        cache = caches(model, tokens)
        clean += cache["clean"]["post", 1][0, :, 7].tolist()
        mask = cache["ablated"]["mask", 1, "mlp_gate"][0, :, 7]
        kept += [v for v, on in zip(cache["ablated"]["post", 1][0, :, 7].tolist(), mask.tolist(), strict=True) if on]
    assert sum(record.series[0].counts) == len(clean) == 14
    edges, near = record.edges, 1e-5  # the two ways of computing a value differ in the last bits
    for one, values in zip(record.series, (clean, kept), strict=False):
        for i, count in enumerate(one.counts):
            surely = sum(edges[i] + near < value < edges[i + 1] - near for value in values)
            perhaps = sum(edges[i] - near <= value <= edges[i + 1] + near for value in values)
            assert surely <= count <= perhaps
    assert f"stays at {len(kept)} of them" in record.note
    assert len(unit_histogram(plain_model, blocks, (1, "attn", 7)).series) == 1
    with pytest.raises(ValueError, match="no unit"):
        unit_histogram(model, blocks, (2, "mlp", 0))
