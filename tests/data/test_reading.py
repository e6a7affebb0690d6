"""One reader of JSON files: what is accepted, and what the message says of every kind of damage."""

from __future__ import annotations

import json
import re

import pytest

from sa_lens.data.reading import DamagedFile, check_object, parse_json, read_json

KEYS = {"name": str, "count": int, "rate": float, "flag": bool}
RIGHT = {"name": "é", "count": 2, "rate": 1, "flag": True}


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_a_right_file_is_read(prefix, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(prefix + json.dumps(RIGHT, ensure_ascii=False).encode())
    assert read_json(path, remedy="", keys=KEYS) == RIGHT
    assert read_json(path, remedy="") == RIGHT


def test_surrogate_pairs_are_characters():
    assert parse_json('["\\ud83d\\ude00"]') == ["😀"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Expecting value: line 1"),
        (b"{", "Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xff\xfe\0", "byte 0 is not UTF-8"),
        ('"é"'.encode("latin-1"), "byte 1 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands there twice"),
        (b'[{"x": {"a": 1, "a": 2}}]', "the key 'a' stands there twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "'1e999' is not a finite number"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
        (b'["\\ud800 Lily"]', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_damage_is_named(content, fault, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(f"{path} is damaged: ") + ".*" + re.escape(fault) + ".*; do this"):
        read_json(path, remedy="do this")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "it must be an object, not []"),
        ({**RIGHT, "other": 1}, "it has the unknown key 'other'"),
        ({k: v for k, v in RIGHT.items() if k != "rate"}, "it lacks 'rate'"),
        ({**RIGHT, "name": 3}, "name must be of type str, not 3"),
        ({**RIGHT, "count": 2.0}, "count must be of type int, not 2.0"),
        ({**RIGHT, "count": True}, "count must be of type int, not True"),
        ({**RIGHT, "rate": False}, "rate must be of type float, not False"),
        ({**RIGHT, "rate": None}, "rate must be of type float, not None"),
        ({**RIGHT, "flag": 1}, "flag must be of type bool, not 1"),
        ({**RIGHT, "name": ["x" * 100]}, "name must be of type str, not ['xxx"),
    ],
)
def test_another_form_is_named(content, fault, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match=re.escape(f"{path} holds no circuit: {fault}")):
        read_json(path, remedy="do this", complaint="holds no circuit", keys=KEYS)


def test_unions_optional_and_other_keys():
    check_object({"a": None}, {"a": int | None})
    check_object({"a": 1}, {"a": float | None})
    check_object({"a": 1, "b": "x"}, {"a": int}, {"b": str, "c": int})
    check_object({"a": 1, "z": "x"}, {"a": int}, other_keys=True)
    with pytest.raises(ValueError, match=r"model\.a must be of type int \| None, not 'x'"):
        check_object({"a": "x"}, {"a": int | None}, where="model.")
    with pytest.raises(ValueError, match="model lacks 'a'"):
        check_object({}, {"a": int}, where="model.")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        read_json(tmp_path / "absent.json", remedy="")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_json(tmp_path, remedy="")
