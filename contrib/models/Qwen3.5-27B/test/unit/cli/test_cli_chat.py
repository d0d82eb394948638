# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 chat`."""

from __future__ import annotations

import io
import sys

import pytest

from qwen35.cli import main
from qwen35.serving.prefix_cache import PrefixCache


def test_chat_answers_line_by_line_and_restores_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restored: list[int] = []
    restore = PrefixCache.restore
    monkeypatch.setattr(
        PrefixCache,
        "restore",
        lambda *args: restored.append(restore(*args)) or restored[-1],  # type: ignore[func-returns-value]
    )
    questions = ["What is the capital of Italy?", "What is the capital of France?"] * 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    assert main(["chat", "--seq-len", "512"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 8 and answers[0] == "Rome." and "Paris" in answers[1]
    assert restored[0] == 0 and restored[-1] >= 128
