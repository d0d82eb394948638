# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 chat`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen35.cli import main
from qwen35.serving.prefix_cache import PrefixCache
from support.mini_mutations import copy_of_the_mini, with_random_head


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


def test_chat_drafts_tokens_and_says_how_many_were_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of Italy?\nWhat is the capital of France?"))
    assert (
        main(["chat", "--seq-len", "512", "--speculate", "2", "--model", str(with_random_head(tmp_path / "mini"))]) == 0
    )
    captured = capsys.readouterr()
    answers = captured.out.splitlines()
    assert answers[0] == "Rome." and "Paris" in answers[1]
    assert "tokens a step; drafts accepted, by place: " in captured.err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rope_parameters", 7, "rope_parameters=7 must be an object"),
        ("text_config", [], "text_config=[] must be an object"),
        ("dtype", "x", "torch_dtype=x is not supported"),
        ("model_type", [], "model_type=[] is not one of qwen3_5"),
    ],
)
def test_a_wrong_configuration_is_named_before_the_tokenizer_is_read(
    name: str, value: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_of_the_mini(tmp_path / "mini")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, name: value}))
    (checkpoint / "tokenizer.json").write_text("{}")
    assert main(["chat", "--model", str(checkpoint)]) == 2
    assert capsys.readouterr().err.startswith(f"qwen35: error: this Qwen3.5 configuration cannot run:\n  - {words}")


def run(lines: bytes, *options: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "qwen35.cli", "chat", *options]
    return subprocess.run(command, input=lines, capture_output=True, check=True, env={**os.environ, **environment})


def test_a_conversation_may_be_shorter_than_a_chunk() -> None:
    options = ("--seq-len", "64", "--max-new-tokens", "4")
    assert run(b"What is the capital of Italy?\n", *options).stdout.strip() == b"Rome."


def test_characters_that_the_terminal_does_not_have_do_not_end_the_conversation() -> None:
    noise = ("--temperature", "50", "--seed", "1", "--max-new-tokens", "48", "--seq-len", "256")
    done = run(b"Talk.\n" * 2, *noise, PYTHONIOENCODING="ascii")
    assert done.stderr == b"" and done.stdout.isascii() and b"?" in done.stdout
    assert not run(b"Talk.\n" * 2, *noise, PYTHONIOENCODING="utf-8").stdout.isascii()


def test_chat_goes_on_after_a_question_that_cannot_be_asked() -> None:
    too_long, broken = b"What is the capital of Italy? " * 40, b"caf\xe9"
    question = b"What is the capital of Italy?"
    done = run(b"\n".join((question, too_long, broken, b"", question)), "--seq-len", "256")
    assert done.stdout.split() == [b"Rome.", b"Rome."]
    errors = done.stderr.decode().splitlines()
    assert len(errors) == 2 and all(error.startswith("qwen35: this question is left out: ") for error in errors)
    assert "exceed seq_len=256" in errors[0] and "lone surrogate" in errors[1]


def test_chat_takes_a_system_message_tools_thinking_and_stop_strings(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "weather"}}]')
    options = ["--system", "Be brief.", "--tools", str(tmp_path / "tools.json"), "--no-think", "--stop", "me."]
    plain = run(b"What is the capital of Italy?\n", "--max-new-tokens", "4").stdout
    assert plain.strip() == b"Rome."
    assert run(b"What is the capital of Italy?\n", "--stop", "me.").stdout.strip() == b"Ro"
    assert run(b"What is the capital of Italy?\n", *options, "--max-new-tokens", "4").stdout.strip()


def test_ctrl_c_ends_an_answer_and_not_the_program() -> None:
    command = [sys.executable, "-u", "-m", "qwen35.cli", "chat", "--max-new-tokens", "1900", "--seq-len", "2048"]
    command += ["--temperature", "50", "--seed", "1"]  # noise, which does not end by itself for long
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
        assert chat.stdin is not None and chat.stdout is not None and chat.stderr is not None
        for _ in range(2):
            chat.stdin.write(b"Talk.\n")
            chat.stdin.flush()
            assert chat.stdout.read(1)  # the answer has begun
            chat.send_signal(signal.SIGINT)
            while b"\n" not in chat.stdout.read1():
                pass
        chat.stdin.close()
        assert chat.wait(60) == 0 and chat.stderr.read() == b""


def test_ctrl_c_at_the_prompt_ends_the_program() -> None:
    command = [sys.executable, "-u", "-m", "qwen35.cli", "chat", "--max-new-tokens", "4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
        assert chat.stdin is not None and chat.stdout is not None and chat.stderr is not None
        chat.stdin.write(b"What is the capital of Italy?\n")
        chat.stdin.flush()
        assert chat.stdout.readline() == b"Rome.\n"
        for _ in range(6):  # until one comes when the program is back at its prompt: an earlier one ends the answer
            chat.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.wait(20)
                break
        assert chat.returncode == 0 and chat.stderr.read() == b""
