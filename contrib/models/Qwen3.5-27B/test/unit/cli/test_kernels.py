# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 kernels` and the figures behind it. All times are modelled."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.cli import main
from qwen35.cli.kernels import (
    Gates,
    KernelCase,
    KernelName,
    hbm_bound_us,
    hbm_bytes,
    measure,
    write_timeline_png,
)
from qwen35.configuration_qwen35 import DTYPES
from qwen35.nki_kernels.nki_seam import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="kernel reports need the emulator")

# Of the largest element: some hundred float32 roundings of 6e-8; a few bfloat16 ones of 4e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Equal keys and underflowing decays: successive writes cancel and what is left carries the roundings of all.
HARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

SMALL = ("--heads", "2", "--key-heads", "1")


def small(kernel: KernelName, tokens: int, dtype: torch.dtype = torch.float32, **others: Any) -> KernelCase:
    return KernelCase(kernel, tokens=tokens, heads=2, key_heads=1, dtype=dtype, **others)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(
    ("kernel", "tokens", "cores"),
    [
        (KernelName.DECODE, 1, 2),
        (KernelName.VERIFY, 3, 1),
        (KernelName.VERIFY, 8, 2),
        (KernelName.COMMIT, 3, 2),
        (KernelName.CHUNKED, 32, 2),
        (KernelName.FUSED, 1, 1),
        (KernelName.FUSED, 130, 2),
        (KernelName.LOOPED, 512, 2),
    ],
)
def test_kernels_are_near_float64(kernel: KernelName, tokens: int, cores: int, dtype: torch.dtype) -> None:
    case = small(kernel, tokens, dtype, cores=cores)
    figures, report = measure(case)
    assert figures.max_error <= TOLERANCE[dtype], case
    assert figures.modelled_us == report.makespan_ns / 1e3 > figures.hbm_bound_us
    assert figures.hbm_bytes_read + figures.hbm_bytes_written >= hbm_bytes(case)


@pytest.mark.parametrize("gates", [Gates.STRONG, Gates.EQUAL_KEYS])
@pytest.mark.parametrize(("kernel", "tokens"), [(KernelName.VERIFY, 4), (KernelName.COMMIT, 4), (KernelName.FUSED, 64)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_hard_gates_cost_little_accuracy(kernel: KernelName, tokens: int, gates: Gates, dtype: torch.dtype) -> None:
    figures, _ = measure(small(kernel, tokens, dtype, gates=gates))
    assert figures.max_error <= HARD_TOLERANCE[dtype]


def test_the_same_case_gives_the_same_figures() -> None:
    case = small(KernelName.DECODE, 1)
    assert measure(case)[0] == measure(case)[0]


def test_the_bound_of_a_decode_step_is_mostly_its_state() -> None:
    case = KernelCase(batch=8)
    state = 2 * 8 * 12 * 128 * 128 * 4  # read and written, float32
    assert state < hbm_bytes(case) < 1.05 * state
    assert hbm_bound_us(case) == pytest.approx(hbm_bytes(case) / (2 * 0.36e12) * 1e6)


def test_the_command_labels_its_times_as_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decode B=1 T=1 H=2 Hk=1 bfloat16 cores=2")
    assert all("modelled" in line or "bound" in line for line in lines if " us" in line)


def test_the_command_writes_json_trace_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace, png = tmp_path / "trace.json", tmp_path / "timeline.png"
    arguments = ("--kernel", "chunked", "--tokens", "32", "--json", "--trace", str(trace), "--png", str(png))
    assert main(["kernels", *SMALL, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["modelled"] and printed["case"]["tokens"] == 32 and printed["figures"]["modelled_us"] > 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1}
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, report = measure(small(KernelName.DECODE, 1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'qwen35-neuron\[plot\]'"):
        write_timeline_png(report, tmp_path / "timeline.png")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--heads", "7", "--key-heads", "2"), "heads=7 is not a multiple of key_heads=2"),
        (("--key-heads", "0"), "key_heads=0"),
        (("--batch", "-1"), "batch=-1"),
        (("--tokens", "2"), "tokens=2: the decode kernel takes 1 token"),
        (("--kernel", "verify", "--tokens", "9"), "tokens=9"),
        (("--kernel", "commit", "--tokens", "9"), "tokens=9"),
        (("--kernel", "chunked", "--tokens", "100"), "tokens=100"),
        (("--kernel", "looped", "--tokens", "768"), "tokens=768"),
        (("--heads", "144", "--key-heads", "1", "--cores", "1"), "H=144"),
    ],
)
def test_what_a_kernel_does_not_take_is_named(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and not captured.out
