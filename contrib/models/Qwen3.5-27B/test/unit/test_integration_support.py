# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the integration suite stands on: its settings and commands, ties, limits, and tables of times."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest
import torch

from qwen35.cli import compile
from qwen35.hardware import TRN2_3XLARGE
from qwen35.planning.plan import preset_application
from qwen35.planning.recommended import device_neuron_config
from qwen35.planning.step import not_modelled, step_model_of
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.speculation import Acceptance
from support.integration import FP8_ENVIRONMENT, MINI_RECORDING, TIE, Settings, require_same_up_to_ties
from support.logit_limits import Limits
from support.recorded_logits import Errors
from support.times_table import HEADER, Spread, Timed, modelled_with_drafts


def test_without_variables_the_mini_and_its_recording_are_tested() -> None:
    assert Settings.from_environment({}) == Settings(MINI_CHECKPOINT, recording=MINI_RECORDING)


def test_variables_name_what_is_tested(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "neuron_config.json").write_text("{}")
    (tmp_path / "recorded").write_text("")
    settings = Settings.from_environment(
        {
            "QWEN35_MODEL_PATH": str(tmp_path),
            "QWEN35_COMPILED_PATH": str(tmp_path),
            "QWEN35_RECORDED_LOGITS": str(tmp_path / "recorded"),
            "QWEN35_REPORT": str(tmp_path / "report.md"),
        }
    )
    assert settings == Settings(tmp_path, tmp_path, tmp_path / "recorded", tmp_path / "report.md")
    assert not settings.is_mini
    assert Settings.from_environment({"QWEN35_MODEL_PATH": str(tmp_path)}).recording is None


def test_all_wrong_variables_are_named_at_once(tmp_path: Path) -> None:
    names = ("QWEN35_MODEL_PATH", "QWEN35_COMPILED_PATH", "QWEN35_RECORDED_LOGITS")
    given = {name: str(tmp_path / name.lower()) for name in names}
    given["QWEN35_REPORT"] = str(tmp_path / "absent" / "report.md")
    with pytest.raises(ValueError) as error:
        Settings.from_environment(given)
    for name, path in given.items():
        assert f"{name}={path}: name " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"weights_dtype": "fp8"}])
def test_the_command_that_is_named_compiles_what_the_tests_ask_for(tmp_path: Path, options: dict[str, str]) -> None:
    settings = Settings(tmp_path / "a checkpoint")
    words = shlex.split(settings.compile_command(**options))
    variables = [word for word in words if "=" in word]
    program, *arguments = words[len(variables) :]
    parser = argparse.ArgumentParser()
    compile.add_parser(parser.add_subparsers())
    args = parser.parse_args(arguments)
    assert program == "qwen35" and args.model == str(settings.model)
    assert {*variables} == ({*FP8_ENVIRONMENT} if options else set())
    assert args.vision and args.speculate > 0 and args.batch > 1 and args.instance == "trn2.3xlarge"
    assert args.weights_dtype == options.get("weights_dtype")
    # 27B with these fits there, in chunks and with a step model for the table.
    neuron_config = device_neuron_config(
        TRN2_3XLARGE, args.tp, args.seq_len, args.batch, num_speculative_tokens=args.speculate, **options
    )
    assert neuron_config.prefill_chunk_size is not None
    assert not_modelled(preset_application("27B", neuron_config)) is None


def test_tokens_may_differ_only_where_logits_are_near_each_other() -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.9], [5.0, 0.0, 0.0]])
    expected = [0, 1, 0]
    require_same_up_to_ties([0, 1, 0], expected, logits, torch.float32)
    require_same_up_to_ties([0, 1], expected, logits, torch.float32)
    # From there on the texts are two: nothing is compared any more.
    require_same_up_to_ties([0, 2, 1], expected, logits, torch.bfloat16)
    assert TIE[torch.float32] < 0.1 < TIE[torch.bfloat16]
    with pytest.raises(AssertionError, match=r"token 1 is 2, expected 1, whose logit is 0\.1 larger"):
        require_same_up_to_ties([0, 2, 0], expected, logits, torch.float32)
    with pytest.raises(AssertionError, match="token 0 is 1"):
        require_same_up_to_ties([1, 1, 0], expected, logits, torch.bfloat16)
    with pytest.raises(AssertionError, match="4 tokens, of 3"):
        require_same_up_to_ties([0, 1, 0, 0], expected, logits, torch.float32)


def errors(**parts: float | bool) -> Errors:
    """Of two positions; the second is without fault."""
    given = dict(largest=0.0, mean=0.0, kl=0.0, same=True, margin=1.0) | parts
    return Errors(**{name: torch.tensor([value, {"same": True}.get(name, 0.0)]) for name, value in given.items()})


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (errors(largest=0.3), "largest error 0.3"),
        (errors(mean=0.04), "mean error 0.02"),
        (errors(kl=0.003), "kl error 0.0015"),
        (errors(same=False, margin=0.75), "other tokens where margins are \\[0.75\\]"),
        (errors(largest=float("nan")), "largest error nan"),
    ],
)
def test_errors_beyond_a_limit_fail_by_its_name(found: Errors, problem: str) -> None:
    limits = Limits(largest=2**-2, mean=2**-6, kl=2**-10)
    limits.check(errors(largest=2**-2, mean=2**-5, kl=2**-9, same=False, margin=2**-1))  # of two positions the mean
    with pytest.raises(AssertionError, match=problem):
        limits.check(found)


def test_modelled_times_stand_beside_measured_ones_of_27b() -> None:
    model = preset_application("27B", device_neuron_config(TRN2_3XLARGE, 4, 8192, 4))
    step = step_model_of(model)
    timed = Timed(1024, 4, Spread.of([0.3, 0.2, 0.4]), Spread.of([0.05, 0.05, 0.06]))
    first, decoding = step.prompt(1024).modelled, step.decode(1024, 4).modelled
    assert timed.line(step, chunk=1024) == (
        f"| 1,024 | 4 | 300.00 (200.00 to 400.00) | {1e3 * first:.2f} | 50.00 (50.00 to 60.00) | "
        f"{1e3 * decoding:.2f} | 80.0 |"
    )
    cells = Timed(4096, 1, timed.first, timed.step).line(step, chunk=1024).split(" | ")
    assert cells[3] == "-", "a prompt of several chunks is not modelled"
    assert Timed(128, 1, timed.first, timed.step).line(None, 1024).count(" - ") == 2
    assert HEADER.count("|") == 2 * timed.line(step, 1024).count("|")


def test_a_token_with_drafts_is_modelled_with_the_acceptance_that_was_counted() -> None:
    model = preset_application("27B", device_neuron_config(TRN2_3XLARGE, 4, 8192, 1, num_speculative_tokens=3))
    step = step_model_of(model)
    acceptance = Acceptance()
    acceptance.add([1, 2, 3], [1, 2, 4])  # two of three
    acceptance.add([5, 6], [5, 7])  # one of two, at the end of a slot
    # Of first drafts all, of second ones after them half, of third ones after these none.
    assert acceptance.conditional_rates == [1.0, 0.5, 0.0]
    seconds = modelled_with_drafts(step, acceptance, 3, 1024)
    assert seconds == pytest.approx(step.with_drafts([1.0, 0.5, 0.0], 1024).modelled / 2.5)
    assert modelled_with_drafts(step, Acceptance(), 3, 1024) == step.with_drafts([0.0] * 3, 1024).modelled
