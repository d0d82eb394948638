# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 chat`."""

from __future__ import annotations

import io
import sys

import pytest

from qwen35.cli import main
from qwen35.serving.prefix_cache import PrefixCache


def test_chat_answers_line_by_line_and_takes_up_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    take_up = PrefixCache.take_up
    monkeypatch.setattr(
        PrefixCache,
        "take_up",
        lambda *args: taken.append(take_up(*args)) or taken[-1],  # type: ignore[func-returns-value]
    )
    questions = ["What is the capital of Italy?", "What is the capital of France?"] * 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    assert main(["chat", "--seq-len", "512"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 8 and answers[0] == "Rome." and "Paris" in answers[1]
    assert taken[0] == 0 and taken[-1] >= 128
