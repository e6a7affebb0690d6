"""Colours that can be read: contrasts as the Web Content Accessibility Guidelines (2.2, level AA) ask for."""

import pytest

from sa_lens.views.theme import DARK, LIGHT, colour_at, colour_scale, contrast, ink_on, strong_scale, write_on

LOOKS = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


def test_contrast_of_known_colours():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#123456", "#123456") == 1
    # the two greys on either side of the limit, as the guidelines' tools give them
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#0000ff", "#ffffff") == pytest.approx(8.59, abs=0.005)


@LOOKS
def test_text_reads_on_every_colour_of_a_scale(dark):
    for scale in (
        *(colour_scale(kind, dark) for kind in ("diverging", "sequential")),
        strong_scale("sequential", dark),
    ):
        for step in range(1001):
            colour = colour_at(scale, step / 1000)
            assert contrast(ink_on(colour), colour) > 4.5, colour
    assert write_on("#2f7fbd", "a < b") == "<span style='color:#000000'>a &lt; b</span>"


@LOOKS
def test_text_and_links_read_on_the_background(dark):
    look = DARK if dark else LIGHT
    for ink in (look.text, look.faint, look.lines[0]):
        assert contrast(ink, look.background) > 4.5, ink
    for ink in (look.text, look.faint):
        assert contrast(ink, look.grid) > 4.5, ink
