"""Short requests to the Hub: whether it answers, and which revision of a dataset is current.

Every access goes through `require_hub` first, because the libraries behind it retry for half a minute where there is no
network. Nothing here downloads text; `sources` does.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from sa_lens.data.cache import new_file
from sa_lens.data.whole_files import read_json

PROBE_SECONDS = 3.0
"""Longest wait for an answer of the Hub, in seconds, name lookup included."""


class HubUnreachable(ConnectionError):
    """The Hub is needed but does not answer."""


def probe(seconds: float = PROBE_SECONDS) -> str | None:
    """Returns None if the Hub answers within `seconds`, else the reason why it does not."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    outcome: list[str | None] = []

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
            # 407 and 5xx are a proxy or gateway speaking; any other answer is the Hub's
            outcome.append(f"HTTP status {status}" if status == 407 or status >= 500 else None)
        except Exception as error:  # whatever the transport raises, the answer is the same
            outcome.append(f"{type(error).__name__}: {error}")

    # A name lookup obeys no socket timeout, so the clock is kept outside; a daemon thread never delays the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


def require_hub(what: str, instead: str) -> None:
    """Checks that the Hub answers.

    Args:
        what: what is wanted from it, for the message.
        instead: the local alternative, for the message.

    Raises:
        HubUnreachable: no answer within `PROBE_SECONDS`.
    """
    reason = probe()
    if reason is not None:
        raise HubUnreachable(f"{what} has to come from the Hub, which cannot be reached ({reason}). Offline: {instead}")


def dataset_revision(dataset_id: str, cache: Path, instead: str) -> str:
    """Returns the current commit of a dataset's default branch; without network, the last one seen.

    Raises:
        HubUnreachable: no network, and the dataset was never used with this cache.
        ValueError: the Hub knows no such dataset, or will not show it.
    """
    try:
        require_hub(f"{dataset_id!r}, no local file or folder but a dataset id,", instead)
    except HubUnreachable:
        if (last := last_revision(dataset_id, cache)) is not None:
            return last
        raise

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        revision = HfApi().dataset_info(dataset_id, timeout=10).sha
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"the Hub has no dataset {dataset_id!r} that you may read, and there is no such local file or folder "
            f"either: {error}"
        ) from error
    if revision is None:
        raise ValueError(f"the Hub names no revision of dataset {dataset_id!r}")
    with new_file(_record(dataset_id, cache)) as temporary:
        temporary.write_text(json.dumps({"revision": revision}), encoding="utf-8")
    return revision


def last_revision(dataset_id: str, cache: Path) -> str | None:
    """The revision of a dataset that was last used with this cache; None if it never was."""
    record = _record(dataset_id, cache)
    if not record.is_file():
        return None
    return str(read_json(record, remedy="delete it and go on with a network", keys={"revision": str})["revision"])


def _record(dataset_id: str, cache: Path) -> Path:
    return cache / "hub" / f"{dataset_id.replace('/', '--')}.json"
