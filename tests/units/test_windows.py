"""Snippets are the most active windows, and a sample of the rest, with the values that the hooks show."""

import pytest
import torch

from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.units import activations
from sa_lens.units.activations import HeldUnits, hold_units, stream_units, text_blocks
from sa_lens.units.firing import unit_scores
from sa_lens.units.windows import snippets


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_windows_are_those_of_a_slow_search(gated, text, stream):
    found = snippets(gated, text, stream, n_top=3, n_sample=4, length=6, progress=False)
    with torch.no_grad():
        if stream == "clean":
            cache = gated.run_with_cache(text)[1]
        else:
            with gated.ablated():
                cache = gated.run_with_cache(text)[1]
    assert list(found) == list(unit_counts(gated))
    for sublayer, record in found.items():
        x = cache[sublayer.value_hook].flatten(2)
        scores = unit_scores(sublayer, x)
        assert record.tokens.shape == record.values.shape == (x.shape[-1], 7, 6)
        for unit in range(x.shape[-1]):
            largest = scores[:, :, unit].amax(1)
            best = largest.sort(descending=True).values[:3]
            torch.testing.assert_close(largest[record.blocks[unit, :3]], best, atol=1e-6, rtol=1e-5)
            assert len(record.blocks[unit].unique()) == 7
            assert largest[record.blocks[unit, 3:]].diff().max() <= 1e-6
            assert largest[record.blocks[unit, 3:]].max() <= best[-1] + 1e-6
            for i in range(7):
                block, start = int(record.blocks[unit, i]), int(record.starts[unit, i])
                assert torch.equal(record.tokens[unit, i], text[block, start : start + 6])
                torch.testing.assert_close(record.values[unit, i], x[block, start : start + 6, unit])
                peak = unit_scores(sublayer, record.values[unit, i])[record.peaks[unit, i]]
                torch.testing.assert_close(peak, largest[block])
                smaller = int((largest < largest[block]).sum())
                assert abs(float(record.quantiles[unit, i]) * 12 - smaller) < 1.01


def test_chosen_units_only(planted, even_text):
    sublayer = Sublayer(0, "mlp")
    record = snippets(
        planted, even_text, units=[Unit(0, "mlp", 2), Unit(0, "mlp", 0)], n_top=2, n_sample=0, length=5, progress=False
    )[sublayer]
    assert record.units.tolist() == [2, 0]
    row = record.of(2)
    assert record.tokens[row].gather(1, record.peaks[row][:, None]).unique().tolist() == [7]
    assert record.values[row].amax(1).tolist() == [2, 2]
    with pytest.raises(ValueError, match="unit=1"):
        record.of(1)


def test_bad_input_gets_a_clear_error(gated, text):
    for options, message in (
        ({"length": 17}, "from 1 to the 16 tokens"),
        ({"n_top": 9}, "has 12 blocks"),
        ({"n_top": 0}, "n_top=0"),
        ({"units": [Unit(0, "mlp", 20)]}, "no unit L0.mlp.20.*L1.mlp.19"),
        ({"units": [Unit(5, "mlp", 0)]}, "no unit L5.mlp.0"),
        ({"units": []}, "units is empty"),
        ({"stream": "grey"}, "must be 'clean' or 'ablated'"),
    ):
        with pytest.raises(ValueError, match=message):
            snippets(gated, text, **{"n_top": 2, "n_sample": 4, "length": 8, "progress": False, **options})


@pytest.mark.parametrize("memory", [2**20, 10])
def test_a_text_that_was_read_once_gives_the_same(gated, text, memory, monkeypatch):
    blocks = hold_units(
        gated, text_blocks(gated, text), ("clean", "ablated"), n_tokens=160, memory=memory, progress=False
    )
    assert isinstance(blocks, HeldUnits) == (memory > 10)
    options = {"n_top": 2, "n_sample": 3, "length": 8, "n_tokens": 130, "progress": False}
    for stream in ("clean", "ablated"):
        expected = snippets(gated, text, stream, **options)
        with monkeypatch.context() as patch:
            if memory > 10:
                patch.setattr(activations, "read_units", lambda *_: pytest.fail("the model ran again"))
            found = snippets(gated, blocks, stream, **options)
        for sublayer, record in expected.items():
            for name in ("tokens", "peaks", "blocks", "starts", "quantiles"):
                assert torch.equal(getattr(found[sublayer], name), getattr(record, name)), name
            torch.testing.assert_close(found[sublayer].values, record.values)


def test_chosen_units_that_were_read_once_give_the_same(gated, text, monkeypatch):
    units = [Unit(0, "mlp", 3), Unit(1, "attn", 2), Unit(0, "mlp", 1)]
    options = {"n_top": 2, "n_sample": 3, "length": 8, "units": units, "progress": False}
    expected = {stream: snippets(gated, text, stream, **options) for stream in ("clean", "ablated")}
    read = list(stream_units(gated, text, ("clean", "ablated"), progress=False))
    blocks = hold_units(gated, text_blocks(gated, text), ("clean", "ablated"), units=units, progress=False)
    monkeypatch.setattr(activations, "read_units", lambda *_: pytest.fail("the model ran again"))
    for stream, of_stream in expected.items():
        found = snippets(gated, blocks, stream, **options)
        for sublayer, record in of_stream.items():
            assert torch.equal(found[sublayer].starts, record.starts)
            torch.testing.assert_close(found[sublayer].values, record.values)
    sublayers = [unit.sublayer for unit in units[:2]]
    again = list(stream_units(gated, blocks, ("clean", "ablated"), sublayers=sublayers, progress=False))
    for held, whole in zip(again, read, strict=True):
        for unit in units:
            mine, theirs = held.masks[unit.sublayer], whole.masks[unit.sublayer]
            assert torch.equal(mine[..., unit.index], theirs[..., unit.index])
            assert mine.shape == theirs.shape
        assert held.values["clean"][units[0].sublayer].isnan().sum(-1).unique().tolist() == [18]
    with pytest.raises(ValueError, match=r"of these sublayers units are in memory: .*mlp"):
        list(stream_units(gated, blocks, "clean", progress=False))
