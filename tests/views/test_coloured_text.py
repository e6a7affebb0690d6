"""Numbers of a story agree with caches; its page needs no script and keeps texts as texts."""

import re
from itertools import pairwise

import pytest
import torch
from characters import EVIL, TOKENS, caches

from sa_lens.views import draw, save, story
from sa_lens.views.records import Story, Track, from_json, to_json
from sa_lens.views.wording import token_texts


def test_tracks_agree_with_caches(model):
    record = story(model, TOKENS, [(1, "mlp", 7), (0, "attn", 5)])
    tracks = {track.name: track for track in record.tracks}
    cache = caches(model)
    live = [
        {
            (layer, gate, unit)
            for layer in range(2)
            for gate in ("attn_gate", "mlp_gate")
            for unit, on in enumerate(cache["ablated"]["mask", layer, gate][0, t].flatten().tolist())
            if on
        }
        for t in range(len(TOKENS))
    ]
    entered = [len(now - before) for before, now in pairwise(live)]
    assert tracks["units that entered"].values == (None, *entered)
    assert tracks["units that entered"].scale == "units of the 14 that stay at a token"
    for stream in ("clean", "ablated"):
        with model.ablated() if stream == "ablated" else model.clean():
            log_p = model(TOKENS[None])[0].log_softmax(-1)
        losses = [-float(log_p[t, TOKENS[t + 1]]) for t in range(len(TOKENS) - 1)]
        assert tracks[f"loss, {stream}"].values == (None, *map(pytest.approx, losses))
        post, z = cache[stream]["post", 1][0, :, 7], cache[stream]["z", 0][0].flatten(1)[:, 5]
        assert tracks[f"L1.mlp.7, {stream}"].values == pytest.approx(post.tolist(), abs=1e-6)
        assert tracks[f"L0.attn.5, {stream}"].values == pytest.approx(z.tolist(), abs=1e-6)
    difference = tracks["ablated minus clean loss"].values
    pairs = zip(tracks["loss, ablated"].values[1:], tracks["loss, clean"].values[1:], strict=True)
    assert difference == (None, *(pytest.approx(a - c, abs=1e-6) for a, c in pairs))
    assert tracks["L1.mlp.7, mask"].values == tuple(cache["ablated"]["mask", 1, "mlp_gate"][0, :, 7].tolist())
    assert from_json(to_json(record)) == record


def test_models_without_gates_have_one_stream(plain_model):
    assert [track.name for track in story(plain_model, TOKENS, [(0, "mlp", 1)]).tracks] == [
        "loss, clean",
        "L0.mlp.1, clean",
    ]


def test_page_shows_each_token_once_with_all_its_numbers(model, tmp_path):
    record = story(model, TOKENS)
    path = save(record, tmp_path / "deep" / "story.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("<bdi ") == len(TOKENS)
    assert text.count("type='radio'") == len(record.tracks)
    assert "<script" not in text
    assert not re.search(r"(src|href)=", text)
    assert f"loss, clean: {record.tracks[1].values[1]:.4g} nats" in text
    assert "dark" in draw(record, dark=True).html()


def test_radio_buttons_of_two_pictures_of_one_record_are_apart(model):
    shown = draw(story(model, TOKENS))
    names = {re.search("name='([^']+)'", shown.html())[1] for _ in range(2)}
    assert len(names) == 2


def test_markup_stays_text(reader):
    text = draw(story(reader, EVIL)).html()
    assert "<script" not in text
    for shown in ("&lt;script&gt;", "&amp;lt;", "&quot;", "¶<br>", "😀", "ש"):
        assert shown in text
    record = Story("<b>", "<i>", ("a",), (Track("<u>", "<s>", (1.0,)),))
    assert not re.search("<(b|i|u|s)>", draw(record).html())


def test_colours_mark_size_and_sign():
    tokens = ("a", "b", "c", "d")
    text = draw(Story("t", "", tokens, (Track("t", "nats", (-1.0, 0.0, 1.0, None), "diverging"),))).html()
    low, middle, high = re.findall("--b0:(#[0-9a-f]{6})", text)
    assert (low, middle, high) == ("#08306b", "#f7f7f5", "#7a2f00")


def test_a_character_of_several_tokens_stands_at_the_last():
    class Bytes:
        bos_token_id = eos_token_id = None

        def encode(self, text, add_special_tokens=False):
            return list(text.encode())

        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

        def convert_ids_to_tokens(self, token):
            return f"<0x{token:02X}>"

    class Model:
        tokenizer = Bytes()

    parts = ("<0xF0>", "<0x9F>", "<0x98>")
    assert token_texts(Model(), Bytes().encode("a😀é!")) == ("a", *parts, "😀", "<0xC3>", "é", "!")
    assert token_texts(Model(), [0xF0, 0x41]) == ("<0xF0>", "A")


def test_refusals(model):
    with pytest.raises(ValueError, match=r"no unit L0.mlp.16.*L1.mlp.15"):
        story(model, TOKENS, [(0, "mlp", 16)])
    with pytest.raises(ValueError, match="no tokenizer"):
        story(model, "Once")
    with pytest.raises(ValueError, match="reads from 1 to n_ctx=16"):
        story(model, torch.zeros(17, dtype=torch.long))
    with pytest.raises(ValueError, match="tokens from 0 to 20"):
        story(model, torch.tensor([0, 20]))
    with pytest.raises(ValueError, match="2 values of x for 1 tokens"):
        Story("t", "", ("a",), (Track("x", "", (1.0, 2.0)),))
