# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Codes of the compiler, and the table of what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35.selftest import known_failures
from qwen35.selftest.known_failures import CODE, TABLE, codes_in, known


def test_codes_are_found_in_errors_and_in_the_compiler_s_logs(tmp_path: Path) -> None:
    (tmp_path / "work" / "compiler").mkdir(parents=True)
    (tmp_path / "log.txt").write_text("ERROR: [NCC_IBTN006] pftranspose\nagain NCC_IBTN006")
    (tmp_path / "work" / "compiler" / "log-neuron-cc.txt").write_text("[NCC_EVRF009] too large")
    (tmp_path / "work" / "graph.hlo").write_text("NCC_AAAA001")
    assert codes_in(tmp_path, "neuronx-cc failed: NCC_INLA001") == ["NCC_INLA001", "NCC_IBTN006", "NCC_EVRF009"]


def test_every_code_that_begins_a_row_of_the_table_is_explained() -> None:
    rows = [line.split("|")[1] for line in TABLE.read_text().splitlines() if line.startswith("| NCC_")]
    codes = {code for row in rows for code in CODE.findall(row)}
    assert len(codes) >= 5
    for code in codes:
        explained = known(code)
        assert explained is not None and "; here: " in explained
    assert known("NCC_AAAA001") is None


def test_without_the_documents_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_failures, "TABLE", tmp_path / "none.md")
    assert known("NCC_IBTN006") is None
