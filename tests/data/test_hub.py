"""The Hub answers, or an error comes within seconds and names the way out."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sa_lens.config import DataConfig
from sa_lens.data import HubUnreachable, hub, prepare


@pytest.fixture
def silent_server() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
def test_a_silent_hub_is_given_up_in_time(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server)
    reason = hub.probe(0.3)
    assert reason is not None


def test_a_hanging_name_lookup_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        def head(self, *_: object, **__: object) -> None:
            time.sleep(5)

    monkeypatch.setattr("huggingface_hub.utils.get_session", Hanging)
    assert hub.probe(0.1) == "no answer within 0.1 s"


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (407, False), (503, False)])
def test_any_answer_of_the_hub_counts(status: int, reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(head=lambda *_, **__: SimpleNamespace(status_code=status))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    assert (hub.probe() is None) == reachable


def test_offline_mode_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.probe() == "HF_HUB_OFFLINE is set"
    with pytest.raises(HubUnreachable, match=r"'someone/stories'.*HF_HUB_OFFLINE is set.*Offline: name a local"):
        prepare(DataConfig(source="someone/stories", cache_dir=str(tmp_path)), 8, progress=False)


def test_a_dataset_without_network_is_an_error_with_the_local_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "probe", lambda: "no route")
    config = DataConfig(source="someone/stories", tokenizer="bpe", cache_dir=str(tmp_path))
    with pytest.raises(HubUnreachable, match=r"'someone/stories'.*no route.*Offline: name a local parquet, jsonl"):
        prepare(config, 8, progress=False)


def test_a_tokenizer_without_network_is_an_error_with_the_local_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "probe", lambda: "no route")
    text = tmp_path / "text.txt"
    text.write_text("one story\nanother story\n")
    config = DataConfig(source=str(text), tokenizer="someone/unheard-of-tokenizer", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(HubUnreachable, match=r"unheard-of-tokenizer.*no route.*let `bpe` train one"):
        prepare(config, 8, progress=False)


def test_the_real_probe_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without network: an answer, one way or the other, and never an exception."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reason = hub.probe()
    assert reason is None or isinstance(reason, str)


def test_a_dataset_seen_before_keeps_its_revision_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(dataset_info=lambda *_, **__: SimpleNamespace(sha="abc123"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: info)
    monkeypatch.setattr(hub, "probe", lambda: None)
    assert hub.dataset_revision("a/b", tmp_path, "nothing") == "abc123"
    monkeypatch.setattr(hub, "probe", lambda: "no route")
    assert hub.dataset_revision("a/b", tmp_path, "nothing") == "abc123"
    with pytest.raises(HubUnreachable):
        hub.dataset_revision("a/c", tmp_path, "nothing")


def test_a_dataset_that_the_hub_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    def unknown(*_: object, **__: object) -> None:
        raise HFValidationError("no such thing")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=unknown))
    monkeypatch.setattr(hub, "probe", lambda: None)
    with pytest.raises(ValueError, match="the Hub has no dataset 'a/b'"):
        hub.dataset_revision("a/b", tmp_path, "nothing")
