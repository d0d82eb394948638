# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Each kernel alone, in the emulator; a wrong output is found wherever it is wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import nki_emulator
from nki_emulator.jit import Kernel
from qwen35.nki_kernels.library_mlp import library_problem
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.selftest.kernel_checks import KERNELS, _require_near, _tuple, run_kernel_check
from qwen35.selftest.outcome import Absent, CheckFailed
from qwen35.selftest.recorded import recorded

pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulator stands in for a device")

OWN = [name for name in KERNELS if name != "mlp"]
QUICK = {"fused-after-state", "fused-plain", "decode", "verify", "commit", "attention-prompt", "attention-decode"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OWN]
)
def test_a_kernel_passes_and_its_error_is_a_few_roundings(name: str, tmp_path: Path) -> None:
    values = run_kernel_check(name, tmp_path)
    assert 0 < values["error"] <= values["tolerance"]
    assert values["modelled_us"] > 0 and values["measured_us"] is None and values["compile_s"] is None


@pytest.mark.parametrize("name", ["decode", "verify", "commit", "attention-decode", "attention-continuation"])
def test_one_wrong_element_of_any_output_is_found(name: str) -> None:
    check = KERNELS[name]
    inputs = check.inputs()
    outputs = _tuple(check.launch(*inputs))
    _require_near(check, inputs, outputs)
    for number, output in enumerate(outputs):
        wrong = [x.clone() for x in outputs]
        at = int(output.abs().argmax())
        wrong[number].view(-1)[at] *= -1
        with pytest.raises(CheckFailed, match="of the largest value"):
            _require_near(check, inputs, tuple(wrong))
        wrong[number].view(-1)[at] = torch.nan
        with pytest.raises(CheckFailed):
            _require_near(check, inputs, tuple(wrong))


def test_a_failure_names_the_worst_element() -> None:
    check = KERNELS["attention-decode"]
    inputs = check.inputs()
    (output,) = _tuple(check.launch(*inputs))
    output[1, 3, 0, 7] = 40.0
    words = r"output 0: error .* at \[1, 3, 0, 7\] it is 40, in float64 "
    with pytest.raises(CheckFailed, match=words):
        _require_near(check, inputs, (output,))
    with pytest.raises(CheckFailed, match=r"output 0 has shape \[1, 6, 1, 256\], not \[2, 6, 1, 256\]"):
        _require_near(check, inputs, (output[:1],))


def test_recorded_times_are_those_of_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded().modelled_us.keys() == {*OWN}
    times: list[float] = []

    def timed(kernel: Kernel, *args: object, **kwargs: object) -> object:
        result = nki_emulator.emulate(kernel, *args, **kwargs)
        times.append(result.report.makespan_ns / 1e3)
        return result.outputs

    monkeypatch.setattr(Kernel, "__call__", timed)
    for name in ("decode", "commit", "attention-decode"):
        times.clear()
        KERNELS[name].launch(*KERNELS[name].inputs())
        assert recorded().modelled_us[name] == round(sum(times), 1), "run tools/record_selftest.py"


def test_the_library_s_kernel_is_absent_without_the_library(tmp_path: Path) -> None:
    if library_problem() is None:
        assert run_kernel_check("mlp", tmp_path)["error"] > 0
    else:
        with pytest.raises(Absent, match="nki-library is not here"):
            run_kernel_check("mlp", tmp_path)


def test_inputs_are_the_same_each_time() -> None:
    start = time.monotonic()
    for check in KERNELS.values():
        assert all(torch.equal(x, y) for x, y in zip(check.inputs(), check.inputs(), strict=True))
    assert time.monotonic() - start < 60
