# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel with a loop on the device in the emulator, against the recurrence written out in float64."""

from __future__ import annotations

import pytest
import torch

import nki_emulator
from qwen35.nki_kernels.chunk_pieces import PLAIN, TILED
from qwen35.nki_kernels.fused_chunked import deltanet_fused_chunked_layer_state
from qwen35.nki_kernels.looped_chunked import LOOP_TOKENS, deltanet_looped_chunked_layer_state
from qwen35.nki_kernels.nki_seam import EMULATED
from support.kernel_cases import TOLERANCE, TOLERANCE_EQUAL_KEYS, Case, check, make_case, naive

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")


def run(case: Case, grid: int | None = None, inverse: str = TILED, timed: bool = False) -> nki_emulator.EmulationResult:
    arguments = [*case.tensors, case.state]
    return nki_emulator.emulate(
        deltanet_looped_chunked_layer_state, *arguments, grid=grid, timed=timed, inverse=inverse
    )


@pytest.mark.parametrize(
    ("B", "loops", "Hk", "R", "dtype", "inverse", "gates"),
    [
        (1, 1, 1, 2, torch.float32, TILED, "mild"),
        (1, 3, 1, 1, torch.float32, TILED, "rare"),
        (2, 2, 1, 1, torch.float32, PLAIN, "strong"),  # what follows the first sequence is the second one
        (1, 2, 2, 1, torch.bfloat16, TILED, "mild"),
    ],
)
def test_the_loop_is_the_recurrence(
    B: int, loops: int, Hk: int, R: int, dtype: torch.dtype, inverse: str, gates: str
) -> None:
    case = make_case(B=B, S=loops * LOOP_TOKENS, Hk=Hk, R=R, K=32, V=16, dtype=dtype, gates=gates, state=True)
    check(run(case, grid=2, inverse=inverse).outputs, naive(case), TOLERANCE[dtype])


def test_equal_keys_with_beta_near_one_stay_accurate() -> None:
    case = make_case(S=2 * LOOP_TOKENS, R=1, K=32, V=16, gates="weak", keys="equal", state=True)
    check(run(case).outputs, naive(case), TOLERANCE_EQUAL_KEYS[torch.float32])


def test_other_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(AssertionError, match="768 tokens: a multiple of 512 is needed"):
        run(make_case(S=768, R=1, K=32, V=16, state=True))


# --- Modelled time and code ------------------------------------------------------------------------------------------
def instructions(result: nki_emulator.EmulationResult) -> int:
    return sum(result.report.cores[0].calls.values())


def test_the_loop_costs_little_time_and_its_code_is_that_of_one_iteration() -> None:
    """Modelled, bfloat16, for 512 and 1,024 tokens. What is executed is some set-up and a body for each iteration."""
    executed, unrolled, times = [], [], []
    for loops in (1, 2):
        case = make_case(S=loops * LOOP_TOKENS, Hk=2, R=1, K=128, V=128, dtype=torch.bfloat16, state=True)
        looped = run(case, grid=2, timed=True)
        other = nki_emulator.emulate(deltanet_fused_chunked_layer_state, *case.tensors, case.state, grid=2)
        executed.append(instructions(looped))
        unrolled.append(instructions(other))
        times.append(looped.report.makespan_ns / other.report.makespan_ns)
    code = executed[0]
    print(f"code {code} instructions, unrolled {unrolled}; time over that of the unrolled kernel {times}")
    assert executed[1] - executed[0] < code, "an iteration issues its body"
    assert code < 0.6 * unrolled[1]
    assert max(times) < 1.6


def test_a_head_of_the_27b_model_fits_on_chip() -> None:
    case = make_case(S=LOOP_TOKENS, Hk=4, R=3, K=128, V=128, dtype=torch.bfloat16, state=True)
    cores = run(case, grid=2).report.cores
    assert max(core.peak_sbuf_bytes for core in cores) <= 96 * 1024
    assert max(core.peak_psum_banks for core in cores) <= 8
