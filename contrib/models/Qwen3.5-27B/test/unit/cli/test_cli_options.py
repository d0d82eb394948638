# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Options that commands share."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from qwen35 import SamplingOptions
from qwen35.cli import main
from qwen35.cli.options import (
    AnswerOptions,
    add_answer_options,
    dtype_named,
    options_from,
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "out", "--dtype", "float16"], "--dtype: float16: must be float32 or bfloat16"),
        (["convert", "out", "--tp", "0"], "--tp: 0: must be at least 1"),
        (["generate", "x", "--max-new-tokens", "-1"], "--max-new-tokens: -1: must be at least 1"),
        *(
            (["chat", f"--cache-gb={size}"], f"--cache-gb: {size}: must be from 0 to 1,000,000")
            for size in ("inf", "nan", "-1", "1e300")
        ),
    ],
)
def test_a_value_that_no_command_takes_is_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["generate", "x"], ["chat"], ["compile", "OUT"], ["convert", "OUT"], ["plan", "--tp", "4"]],
    ids=lambda command: command[0],
)
def test_every_command_that_runs_a_model_reads_the_settings_before_anything_else(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trn2.json").write_text('{"format": 1, "kernels": {"deltanet_kernel": "fast"}}')
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in command]
    assert main([*arguments, "--settings", str(tmp_path / "trn2.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"qwen35: error: {tmp_path}/trn2.json: kernels: deltanet_kernel='fast' must be one of auto,"
    )
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_options_are_the_arguments_of_their_names_and_cannot_change() -> None:
    @dataclass(frozen=True)
    class Options(AnswerOptions):
        dtype: torch.dtype

    penalties = dict(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.1)
    chosen = dict(max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, seed=1, min_p=0.1, **penalties, sampling=None)
    options = options_from(Options, argparse.Namespace(run=main, **chosen, dtype=dtype_named("bfloat16")))
    assert options == Options(3, 0.5, 0.9, 7, 1, 0.1, *penalties.values(), None, torch.bfloat16)
    assert options.sampling_of(Path("no-such-checkpoint")) == SamplingOptions(0.5, 0.9, 7, 1, 0.1, 1.1, 1.5, 0.5)
    with pytest.raises(AttributeError):
        options.seed = 2  # type: ignore[misc]


def test_sampling_of_the_checkpoint_fills_in_what_is_not_given(tmp_path: Path) -> None:
    fields = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    parser = argparse.ArgumentParser()
    add_answer_options(parser)

    def sampling(*arguments: str) -> SamplingOptions:
        return options_from(AnswerOptions, parser.parse_args(arguments)).sampling_of(tmp_path)

    assert sampling() == SamplingOptions()
    of_checkpoint = SamplingOptions(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    assert sampling("--sampling", "checkpoint") == of_checkpoint
    given = sampling("--sampling", "checkpoint", "--temperature", "0", "--min-p", "0.1", "--seed", "3")
    assert given == replace(of_checkpoint, temperature=0.0, min_p=0.1, seed=3)
