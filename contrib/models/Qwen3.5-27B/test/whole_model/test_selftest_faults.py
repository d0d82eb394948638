# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest` with faults below it: it goes on, says which, and `qwen35 compile` takes the settings it wrote."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from support.applications import needs_stand_ins
from support.faults import run_with_fault

pytestmark = [pytest.mark.slow, needs_stand_ins]

WHOLE = {"deltanet_kernel": "fused", "deltanet_inverse": "tiled"}
CHECK_MINUTES = "1.5"
AUTO = {"context_encoding": "auto", "continuation": "auto", "token_generation": "auto"}


@pytest.mark.parametrize(
    ("fault", "check", "words", "kernels"),
    [
        (
            "not_compiling",
            "attention-prompt",
            "AttributeError: module 'nki_emulator.isa' has no attribute 'nc_matmul_of_a_later_nki'",
            WHOLE | {"attention_kernel": AUTO | {"context_encoding": "torch"}},
        ),
        (
            "hanging_compiler",
            "fused",
            "it did not end within 90 s",
            {"deltanet_kernel": "fused", "deltanet_inverse": "plain", "attention_kernel": AUTO},
        ),
        (
            "dying_compiler",
            "attention-decode",
            "its process was ended by SIGKILL",
            WHOLE | {"attention_kernel": AUTO | {"token_generation": "torch"}},
        ),
        (
            "wrong_bit",
            "decode",
            "of the largest value, more than 1e-02",
            {"deltanet_kernel": "torch", "deltanet_inverse": "tiled", "attention_kernel": AUTO},
        ),
        (
            "little_memory",
            "attention-continuation",
            "MemoryError",
            WHOLE | {"attention_kernel": AUTO | {"continuation": "torch"}},
        ),
    ],
)
def test_a_fault_changes_the_settings_and_compile_uses_them(
    fault: str, check: str, words: str, kernels: dict[str, Any], tmp_path: Path
) -> None:
    found = tmp_path / "found"
    start = time.monotonic()
    ended = run_with_fault(
        fault, "selftest", "--tp", "1", "--output", str(found), "--check-limit", CHECK_MINUTES, scratch=tmp_path
    )
    print(f"{fault}: {time.monotonic() - start:.0f} s\n{ended.output}")
    assert ended.status == 1, ended.errors
    results = json.loads((found / "results.json").read_text())["results"]
    assert words in results[check]["error"]
    assert results["mini-tp1"]["status"] == "passed"
    settings = json.loads((found / "settings.json").read_text())
    assert settings["kernels"] == kernels
    page = (found / "report.md").read_text()
    assert f"**{check}**" in page and words in page
    with tarfile.open(found / "selftest-report.tar.gz") as archive:
        assert f"selftest/checks/{check}/log.txt" in archive.getnames()

    compiled = tmp_path / "compiled"
    arguments = ("compile", str(compiled), "--seq-len", "256", "--settings", str(found / "settings.json"))
    assert run_with_fault(fault, *arguments, scratch=tmp_path).status == 0
    neuron_config = json.loads((compiled / "neuron_config.json").read_text())["neuron_config"]
    chosen = {name: neuron_config[name] for name in ("deltanet_kernel", "deltanet_inverse")}
    assert chosen == {name: kernels[name] for name in chosen}
    for phase, kernel in kernels["attention_kernel"].items():
        if kernel == "torch":
            assert neuron_config["attention_kernel"][phase] == "torch"
