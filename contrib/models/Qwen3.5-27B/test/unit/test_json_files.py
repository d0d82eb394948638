# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is read from JSON, what is refused, and that what errors quote stays in its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.json_files import parse_json, read_json, read_object, wrong_fields

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"[" * 33 + b"]" * 33, b"9" * 5000])
def test_no_json_is_one_line_with_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]*x\.json is not valid JSON [^\n]*; download it again$"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("data", ["[]", "null", "7", '"ab"', '[["a", 1]]', "true"])
def test_what_is_no_object_is_one_line_with_the_file(tmp_path: Path, data: str) -> None:
    (tmp_path / "x.json").write_text(data)
    with pytest.raises(ValueError, match=r"^[^\n]*x\.json holds a \w+, not an object; download it again$"):
        read_object(tmp_path / "x.json")


def test_no_file_is_an_empty_object_and_a_link_to_nothing_is_none(tmp_path: Path) -> None:
    assert read_object(tmp_path / "x.json") == {}
    (tmp_path / "x.json").symlink_to("y.json")
    with pytest.raises(ValueError, match=r"x\.json is a link to nothing; download it again"):
        read_object(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "x.json") == {"a": 1}


def test_wrong_fields_are_named_with_what_they_must_be() -> None:
    rules = {name: (lambda value: isinstance(value, int), "a number") for name in ("a", "b", "c", "d")}
    problems = wrong_fields({"a": "x" * 999, "b": 1, "c": None, "e": "x"}, rules)
    assert len(problems) == 1 and problems[0].startswith("a='xxx") and problems[0].endswith("... must be a number")


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="not a file but a directory, a pipe or a device"):
            read_json(tmp_path / name)
    for name in ("nothing", "loop"):
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path / ("x" * 300))


def test_a_file_without_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.json").chmod(0)
    if os.access(tmp_path / "x.json", os.R_OK):  # root reads everything
        monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(ValueError, match=r"x\.json cannot be read \(.*\); correct its permissions"):
        read_json(tmp_path / "x.json")
