"""Fixtures of the training tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import MakeRun, tiny_run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, and other tests may have set their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of token files shared by the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(cache: Path) -> MakeRun:
    """`tiny_run` with the shared cache."""
    return functools.partial(tiny_run, cache)
