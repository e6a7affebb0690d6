"""Damaged JSON of circuits, cells, records and reports: the error names the file or the value, and is a ValueError."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sa_lens.circuits.graph import Circuit
from sa_lens.compare.grids import smoke
from sa_lens.compare.model_folder import ModelFolder
from sa_lens.report import Report
from sa_lens.views import records

CIRCUIT = {
    "format": "sa_lens circuit",
    "version": 1,
    "graph": {"n_layers": 2, "n_heads": 2, "attn_only": False, "parallel": False},
    "about": {},
    "edges": ["embed->m0"],
    "scores": {"embed->m0": 1},
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"graph": None}, "graph must be of type dict"),
        ({"about": []}, "about must be of type dict"),
        ({"graph": {**CIRCUIT["graph"], "z": 1}}, "unknown key graph.'z'"),
        ({"graph": {"n_layers": 2}}, "graph. lacks the key 'n_heads'"),
        ({"graph": {"n_layers": 10**9, "n_heads": 2}}, "no graph of 1000000000 layers"),
        ({"graph": {"n_layers": 2.0, "n_heads": 2}}, "graph.n_layers=2.0 must be a whole number"),
        ({"edges": 5}, "edges must be of type list"),
        ({"edges": [5]}, "edges=5 must be text"),
        ({"edges": ["m1->m0"]}, "no edge m1->m0"),
        ({"scores": [1]}, "scores must be of type dict"),
        ({"scores": {"embed->m0": "high"}}, "scores.embed->m0='high' must be a number"),
        ({"version": 99}, "its version is 99, this sa_lens reads 1"),
        ({"more": 1}, "it has the unknown key 'more'"),
    ],
)
def test_circuits(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(CIRCUIT))
    assert Circuit.load(path).table()["score"].tolist() == [1.0]
    path.write_text(json.dumps({**CIRCUIT, **change}))
    with pytest.raises(ValueError, match=rf"c\.json is damaged: .*{re.escape(fault)}.*; find the circuit again"):
        Circuit.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\0", b"[" * 100_000, b'{"format": NaN}'])
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.json is damaged: .*; find the circuit again"):
        Circuit.load(path)
    with pytest.raises(ValueError, match=r"c\.json is damaged: .*; save the record again"):
        records.read(path)


def test_models_of_a_comparison(tmp_path: Path) -> None:
    grid = smoke()
    folder, measurement = ModelFolder(grid, grid.variants[0], 0, tmp_path), grid.measurements[0]
    folder.path.mkdir(parents=True)
    done = {"weights": "abc", "text": {"train": "t", "validation": "v"}, "seconds": 1.5}
    for content in ("[]", "{}", "{", '{"weights": 3, "text": {}, "seconds": 1}', json.dumps({**done, "text": "t"})):
        (folder.path / "done.json").write_text(content)
        with pytest.raises(ValueError, match=r"done\.json is damaged: .*; delete it, it will be made again"):
            folder.trained()
    (folder.path / "done.json").write_text(json.dumps(done))
    assert folder.trained() == done
    figures = {"values": {"loss": {"clean": 1.5, "ablated": None}}, "notes": ["a"], "seconds": 2}
    file = folder.result_file(measurement, done)
    for change in (
        {"values": []},
        {"notes": None},
        {"seconds": "2"},
        {"values": {"loss": 3}},
        {"values": {"loss": {"clean": "x"}}},
        {"notes": [3]},
    ):
        file.write_text(json.dumps({**figures, **change}))
        with pytest.raises(ValueError, match=r"losses.* is damaged: .*; delete it, it will be made again"):
            folder.result(measurement)
    file.write_text(json.dumps(figures))
    result = folder.result(measurement)
    assert result is not None
    assert (result.values, result.notes) == ({"loss": {"clean": 1.5, "ablated": None}}, ("a",))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", "it must be an object"),
        ("{}", "it lacks 'kind'"),
        ('{"kind": "Tabel"}', "its kind is 'Tabel'; perhaps you meant Table"),
        ('{"kind": "Table"}', "Table lacks the key"),
        ('{"kind": "Table", "rows": 3}', "rows=3 must be a list"),
        ('{"kind": "Table", "nothing": 3}', "unknown key 'nothing'"),
    ],
)
def test_records(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"^not a record of .*{re.escape(fault)}.*; text begins"):
        records.from_json(text)


def test_reports() -> None:
    for text in (
        "",
        "[]",
        "{}",
        '{"kind": "Report", "title": 3}',
        '{"kind": "Report", "title": "a", "version": "1", "models": 3, "comparison": null}',
        "\ud800",
    ):
        with pytest.raises(ValueError, match=r"^not a record of Report: .*; text begins"):
            records.from_json(text, [Report])
