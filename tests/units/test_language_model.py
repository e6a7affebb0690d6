"""Asking a chat model: a server in this process answers, fails, and counts."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from sa_lens.core.unit import Unit
from sa_lens.units.contexts import ContextTrie
from sa_lens.units.explanations import Explanation, Snippet
from sa_lens.units.language_model import (
    DETECT,
    EXPLAIN,
    BudgetError,
    ChatModel,
    explain_by_chat,
    mark_active_tokens,
    read_numbers,
)


@pytest.fixture
def server():
    """A server whose `answers` are functions of the question, and which keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append((self.path, body, self.headers.get("Authorization")))
            status, answer = httpd.answer(body)
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked = []
    httpd.answer = lambda body: (200, said("fine"))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def said(text, tokens=7):
    return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}}


def chat(server, **settings):
    return ChatModel(f"http://127.0.0.1:{server.server_port}/v1", "small", **{"backoff": 0.0, **settings})


def test_a_question_is_asked_as_the_endpoint_expects(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    model = chat(server, key_variable="A_KEY")
    assert model.ask("be brief", "why?", answer_tokens=5) == "fine"
    ((path, body, key),) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("small", 0, 5)
    assert (model.calls, model.tokens) == (1, 7)


def test_the_same_question_is_asked_once(server, tmp_path):
    first, second = (chat(server, cache_dir=tmp_path / "answers") for _ in range(2))
    assert [m.ask("a", "b") for m in (first, first, second)] == ["fine"] * 3
    assert (first.calls, second.calls) == (1, 0)
    second.ask("a", "c")
    assert len(server.asked) == 2
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "answers").iterdir())


def test_failures_are_tried_again(server, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    turns = iter([(503, b"busy"), (429, b"slow down"), (200, said("at last"))])
    server.answer = lambda body: next(turns)
    model = chat(server, backoff=0.5)
    assert model.ask("a", "b") == "at last"
    assert model.calls == 3
    assert waits == [0.5, 1.0]


def test_a_server_that_keeps_failing_is_given_up(server):
    server.answer = lambda body: (500, b"broken")
    with pytest.raises(ConnectionError, match=r"after 3 calls.*status 500, 'broken'"):
        chat(server, retries=2).ask("a", "b")
    assert len(server.asked) == 3


def test_nobody_there_is_given_up():
    with pytest.raises(ConnectionError, match="no answer from"):
        ChatModel("http://127.0.0.1:9", "small", retries=1, backoff=0.0).ask("a", "b")


def test_a_refusal_is_not_tried_again(server):
    server.answer = lambda body: (401, b"no such key")
    with pytest.raises(ValueError, match=r"refuses the question: status 401, 'no such key'"):
        chat(server).ask("a", "b")
    assert len(server.asked) == 1


@pytest.mark.parametrize("answer", [b"<html>", {"choices": []}, {"error": "x"}, []])
def test_answers_in_another_format_are_refused(server, answer):
    server.answer = lambda body: (200, answer)
    with pytest.raises(ValueError, match="not in the format"):
        chat(server).ask("a", "b")


def test_the_budget_holds(server, tmp_path):
    few = chat(server, max_calls=2, cache_dir=tmp_path)
    few.ask("a", "1")
    few.ask("a", "2")
    with pytest.raises(BudgetError, match="2 of max_calls=2"):
        few.ask("a", "3")
    assert few.ask("a", "1") == "fine"
    short = chat(server, max_tokens=10)
    short.ask("a", "1")
    short.ask("a", "2")
    with pytest.raises(BudgetError, match="14 of max_tokens=10"):
        short.ask("a", "3")
    server.answer = lambda body: (500, b"broken")
    with pytest.raises(BudgetError, match="the last call failed: status 500"):
        chat(server, max_calls=1).ask("a", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:80"}, "must begin with http"),
        ({"key_variable": "SURELY_NOT_SET"}, "SURELY_NOT_SET"),
        ({"max_calls": -1}, "max_calls=-1"),
        ({"backoff": -1.0}, "backoff=-1.0"),
        ({"timeout": 0.0}, "timeout=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatModel(**{"url": "http://localhost/v1", "model": "small", **settings})


# ------------------------------------------------------------------------------------------------------- explanations


def unit(**snippets):
    snippets = {"fitted": (), "firing": (), "silent": (), **snippets}
    return Explanation(
        unit=Unit(1, "mlp", 4),
        stream="clean",
        level=1.0,
        trie=ContextTrie(),
        contexts=(),
        pattern="",
        **snippets,
    )


CAT, DOG = Snippet((0, 1, 2), (0.0, 4.0, 0.0)), Snippet((0, 3, 2), (0.0, 0.0, 0.0))
WORDS = ["the", " cat", ".", " dog"]


def knows_cats(body):
    """Answers as one who knows that the unit is active on cats."""
    system, question = (message["content"] for message in body["messages"])
    if system == EXPLAIN:
        return 200, said("Cats.")
    lines = question.split("\n\n")[1].split("\n")
    scale = 1 if system == DETECT else 9
    return 200, said(f"Sure: {json.dumps([scale * ('cat' in line) for line in lines])}")


def test_units_are_explained_and_judged(server):
    server.answer = knows_cats
    model = chat(server)
    table = explain_by_chat(
        model, [unit(fitted=(CAT,), firing=(CAT, CAT), silent=(DOG, DOG)), unit()], WORDS.__getitem__, progress=False
    )
    (row,) = table.to_dict("records")
    assert (row["layer"], row["site"], row["unit"], row["explanation"]) == (1, "mlp", 4, "Cats.")
    assert (row["detection"], row["unread"]) == (1.0, 0)
    assert row["simulation"] == pytest.approx(1)
    assert model.calls == 1 + 1 + 4
    assert server.asked[0][1]["messages"][1]["content"] == "1. the<< cat>>(10)."


def test_a_useless_explanation_scores_as_chance(server):
    server.answer = lambda body: (
        200,
        said("[1, 1, 1, 1]" if body["messages"][0]["content"] == DETECT else "[1, 1, 1]"),
    )
    few = [unit(fitted=(CAT,), firing=(CAT, CAT), silent=(DOG, DOG))]
    (row,) = explain_by_chat(chat(server), few, WORDS.__getitem__, progress=False).to_dict("records")
    assert (row["detection"], row["simulation"]) == (0.5, 0.0)


def test_answers_that_cannot_be_read_are_counted(server):
    server.answer = lambda body: (200, said("I would rather not."))
    few = [unit(fitted=(CAT,), firing=(CAT,), silent=(DOG,))]
    (row,) = explain_by_chat(chat(server), few, WORDS.__getitem__, progress=False).to_dict("records")
    assert row["unread"] == 3
    assert np.isnan(row["detection"])
    assert np.isnan(row["simulation"])


def test_what_a_list_of_numbers_is():
    assert read_numbers("of course: [1, 0.5, 2]!", 3) == [1.0, 0.5, 2.0]
    for answer in ("[1, 2]", "1, 2, 3", "[1, 2, true]", '[1, 2, "x"]', "[1, 2, NaN]", "][", "{}"):
        assert read_numbers(answer, 3) is None


def test_activations_are_shown_from_1_to_10():
    assert mark_active_tokens(Snippet((0, 1, 2), (0.1, 5.0, 2.4)), WORDS.__getitem__, 5.0) == "the<< cat>>(10)<<.>>(5)"
    assert mark_active_tokens(DOG, WORDS.__getitem__, 0.0) == "the dog."


def test_too_few_snippets_are_refused(server):
    with pytest.raises(ValueError, match="judged=1"):
        explain_by_chat(chat(server), [], str, judged=1)
