# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The recorded kernel times: what the emulator gives now, and what lies between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.planning.kernel_times import RecordedTime, TimedKernel, kernel_seconds, recorded_times
from record_kernel_times import cases, modelled_us

needs_emulator = pytest.mark.skipif(not EMULATED, reason="the Neuron SDK's nki has taken the emulator's place")

QUICK = [
    (TimedKernel.DECODE, 1, 12),
    (TimedKernel.VERIFY, 4, 12),
    (TimedKernel.COMMIT, 4, 12),
    (TimedKernel.FUSED, 128, 12),
    (TimedKernel.LOOPED, 512, 6),
    (TimedKernel.ATTENTION_PROMPT, 256, 6),
    (TimedKernel.ATTENTION_CACHED, 1, 4096),
    (TimedKernel.ATTENTION_CACHED, 4, 4096),
]
"""One row of each kernel, or two; each takes the emulator a second at most."""


def assert_fresh(row: RecordedTime) -> None:
    now = modelled_us(row.kernel, row.tokens, row.size)
    # The file has two decimals.
    assert row.microseconds == pytest.approx(now, abs=0.0051), f"{row}: stale, run benchmarks/record_kernel_times.py"


@needs_emulator
@pytest.mark.parametrize("case", QUICK, ids=lambda case: "-".join(map(str, case)))
def test_a_recorded_time_is_what_the_emulator_gives(case: tuple[TimedKernel, int, int]) -> None:
    [row] = [row for row in recorded_times() if row[:3] == case]
    assert_fresh(row)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("row", recorded_times(), ids=lambda row: "-".join(map(str, row[:3])))
def test_each_recorded_time_is_what_the_emulator_gives(row: RecordedTime) -> None:
    assert_fresh(row)


def test_the_file_has_every_case_once() -> None:
    assert [row[:3] for row in recorded_times()] == sorted(cases())


@pytest.mark.parametrize("row", recorded_times(), ids=lambda row: "-".join(map(str, row[:3])))
def test_what_is_recorded_is_not_interpolated(row: RecordedTime) -> None:
    assert kernel_seconds(*row[:3]) == pytest.approx(1e-6 * row.microseconds, rel=1e-12)


@given(
    kernel=st.sampled_from(TimedKernel),
    tokens=st.integers(1, 4096),
    size=st.integers(1, 10**6),
    more=st.integers(1, 99),
)
def test_more_never_takes_less(kernel: TimedKernel, tokens: int, size: int, more: int) -> None:
    seconds = kernel_seconds(kernel, tokens, size)
    assert seconds <= kernel_seconds(kernel, tokens, size + more)
    assert seconds <= kernel_seconds(kernel, tokens + more, size) * (1 + 1e-9)


def test_between_two_times_and_beyond_the_last_it_is_a_line() -> None:
    of = {row.size: row.microseconds for row in recorded_times() if row.kernel is TimedKernel.DECODE}
    assert 1e6 * kernel_seconds(TimedKernel.DECODE, 1, 72) == pytest.approx((of[48] + of[96]) / 2)
    assert 1e6 * kernel_seconds(TimedKernel.DECODE, 1, 288) == pytest.approx(of[192] + (of[192] - of[96]))
    assert 1e6 * kernel_seconds(TimedKernel.DECODE, 1, 3) == of[6], "a launch is no shorter for fewer heads"
    prompt = kernel_seconds(TimedKernel.ATTENTION_PROMPT, 1024, 6)
    assert kernel_seconds(TimedKernel.ATTENTION_PROMPT, 1024, 12) == pytest.approx(2 * prompt)
