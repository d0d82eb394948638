# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The table of a step by part, as it is printed and as the documentation has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35.cli.step_report import lines_of, step_json, step_lines
from qwen35.hardware import TRN2_3XLARGE
from qwen35.planning.plan import plan
from qwen35.planning.ports import compare
from qwen35.planning.step import ASSUMPTIONS, step_model_of
from support.applications import SMALL, application, needs_stand_ins, of_27b

pytestmark = pytest.mark.usefixtures("outside_any_rank")

DOCUMENT = Path(__file__).parents[3] / "docs" / "step.md"


def test_the_documentation_shows_what_is_printed_for_27b_on_4_ranks() -> None:
    step = step_model_of(of_27b(num_speculative_tokens=3))
    passes = [step.decode(4096), step.prompt(1024), step.with_drafts((0.85, 0.75, 0.65), 4096)]
    printed = list(lines_of(passes, compare(step, step_model_of(of_27b(num_speculative_tokens=3), copies=4))))
    assert "\n".join(printed) in DOCUMENT.read_text()


@needs_stand_ins
def test_a_plan_is_printed_with_the_context_and_the_prompt_it_has_room_for() -> None:
    rope = {**SMALL["rope_parameters"], "mrope_section": [11, 11, 10]}
    fields = {**SMALL, "head_dim": 256, "rope_parameters": rope}
    found = plan(application(fields, seq_len=512, max_context_length=256, num_speculative_tokens=2), TRN2_3XLARGE)
    printed = step_json(found, [0.5, 0.5])
    assert [column["what"] for column in printed["modelled"]] == [
        "decoding step, 512 cached",
        "prompt, 256 tokens",
        "step with 2 drafts, 512 cached",
    ]
    for column in printed["modelled"]:
        assert column["modelled"] == pytest.approx(sum(part["modelled"] for part in column["parts"]))
        assert column["modelled_over_roofline"] == pytest.approx(column["modelled"] / column["roofline"])
    assert [column["tokens"] for column in printed["modelled"]] == [1.0, None, 1.75]
    assert len(printed["assumptions"]) == len(ASSUMPTIONS) and printed["measured_by_ports"] == []
    assert any(line.startswith("  MTP head: 2 drafts") for line in step_lines(found, [0.5, 0.5]))


@needs_stand_ins
def test_a_plan_says_why_there_are_no_times() -> None:
    found = plan(application(SMALL, seq_len=256), TRN2_3XLARGE)
    [line] = step_lines(found)
    assert line.startswith("where the time goes, by part: not modelled, since kernel times are recorded with attention")
    assert [*step_json(found)] == ["not_modelled"]


def test_the_columns_of_the_table_add_up() -> None:
    step = step_model_of(of_27b(batch=2))
    lines = [*lines_of([step.decode(4096, 2), step.prompt(512)], [])]
    first, last = (next(i for i, line in enumerate(lines) if text in line) for text in ("A least", "in all"))
    rows = [[float(cell) for cell in line.split()[-4:]] for line in lines[first + 1 : last + 1]]
    for *parts, total in zip(*rows, strict=True):
        assert sum(parts) == pytest.approx(total, abs=0.0005 * len(rows))  # three decimals each
    assert lines[1] == "  A: decoding step, 2 sequences, each 4,096 cached"
    assert not any("ports" in line for line in lines)
