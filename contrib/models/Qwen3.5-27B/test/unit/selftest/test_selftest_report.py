# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The page of a self-test."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from qwen35.selftest import report
from qwen35.selftest.outcome import Result, Status
from qwen35.selftest.plan import Check, Conclusion, Kernels, Kind, Options
from qwen35.selftest.report import as_page, one_line_of
from qwen35.selftest.verdict import ExitStatus, settings_of

ENVIRONMENT = Check("environment", Kind.ENVIRONMENT, "the machine")
FUSED = Check("fused", Kind.KERNEL, "kernel fused alone", 1)
DECODE = Check("decode", Kind.KERNEL, "kernel decode alone", 1)
MINI = Check("mini-tp1", Kind.MODEL, "the mini", 2)
SERVER = Check("server", Kind.SERVER, "vLLM's server", 2)
DEVICE = {"number": 0, "cores": 4, "lnc": 2, "hbm_bytes": 96 << 30, "free_hbm_bytes": 95 << 30, "processes": 0}
KERNEL = {"error": 5.4e-3, "tolerance": 1e-2, "modelled_us": 58.1, "measured_us": 123.4, "compile_s": 60.0}
RESULTS = {
    "environment": Result(Status.PASSED, 4, values={"instance": "trn2.3xlarge", "devices": [DEVICE], "driver": "2.26"}),
    "fused": Result(Status.PASSED, 70, values=KERNEL, note="it was cut once"),
    "decode": Result(
        Status.FAILED, 9, "RuntimeError: neuronx-cc failed\n[NCC_IBTN006] pftranspose", note="tried twice"
    ),
    "mini-tp1": Result(Status.PASSED, 200, values={"ttft_s": 0.02, "tpot_s": 0.005, "compile_s": 150.0}),
    "server": Result(Status.ABSENT, 1, "vLLM is not installed here"),
}


def page(tmp_path: Path) -> str:
    conclusion = Conclusion(Kernels("fused"), 1, {"speculation": "verify: it said so"})
    for name in RESULTS:
        (tmp_path / "checks" / name).mkdir(parents=True, exist_ok=True)
    options = Options(1, 1)
    settings = settings_of(conclusion, options, RESULTS)
    done = [ENVIRONMENT, FUSED, DECODE, MINI, SERVER]
    return as_page(options, done, RESULTS, conclusion, settings, ExitStatus.SETTINGS_NEEDED, tmp_path)


def test_a_failure_has_its_first_lines_and_the_row_of_its_code(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "**decode** (kernel decode alone): failed after 9 s\n\ntried twice\n" in text
    assert "```text\nRuntimeError: neuronx-cc failed\n[NCC_IBTN006] pftranspose\n```" in text
    assert "NCC_IBTN006: a dense decode graph with `--modular-flow-mac-threshold=10` at `-O1`" in text
    assert "- server (vLLM's server): vLLM is not installed here" in text
    assert "- fused: it was cut once" in text
    assert '"speculation": "verify: it said so"' in text
    assert f"`qwen35 compile OUTPUT --settings {tmp_path}/settings.json ...` takes them." in text


def test_on_a_device_measured_times_stand_beside_modelled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NXDI_AVAILABLE", True)
    text = page(tmp_path)
    assert "Device: trn2.3xlarge." in text
    assert "| fused | passed | 5.4e-03 (1e-02) | 58.1 | 123.4 |" in text
    assert "| mini-tp1 | the mini | passed | 20.0 | 5.0 | 150.0 |" in text
    assert "| devices | 1: 0 (4 cores, LNC 2, 96 GiB, 95.0 free) |" in text
    assert "measured 123.4 us from the host" in one_line_of(FUSED, RESULTS["fused"])


def test_elsewhere_it_says_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NXDI_AVAILABLE", False)
    text = page(tmp_path)
    assert "kernels are emulated, their times modelled" in text and "| TTFT" not in text
    assert "| mini-tp1 | the mini | passed | 200 |" in text


def test_every_table_has_as_many_cells_as_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (False, True):
        monkeypatch.setattr(report, "NXDI_AVAILABLE", available)
        widths = [line.count("|") if line.startswith("|") else 0 for line in page(tmp_path).splitlines()]
        changes = [(a, b) for a, b in pairwise(widths) if a and b and a != b]
        assert not changes


def test_a_line_says_what_became_of_a_check() -> None:
    assert one_line_of(DECODE, RESULTS["decode"]) == "decode: failed, 9 s: RuntimeError: neuronx-cc failed"
