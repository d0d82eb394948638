# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel of one chunk in the emulator, against the recurrence written out token by token in float64."""

from __future__ import annotations

import pytest
import torch

import nki_emulator
from qwen35.nki_kernels.chunked import deltanet_chunk_step
from qwen35.nki_kernels.nki_seam import EMULATED
from support.kernel_cases import TOLERANCE, check, make_case, naive

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")


@pytest.mark.parametrize("C", [32, 64, 128])
def test_chunk_steps_in_a_row_are_the_recurrence(C: int) -> None:
    case = make_case(B=2, S=2 * C, Hk=2, R=2, K=32, V=16, state=True)
    state, outputs = case.state, []
    for start in (0, C):
        chunk = [x[:, start : start + C].contiguous() for x in case.tensors]
        o, state = nki_emulator.emulate(deltanet_chunk_step, *chunk, state, grid=2, timed=False).outputs
        outputs.append(o)
    check((torch.cat(outputs, dim=1), state), naive(case), TOLERANCE[torch.float32])


def test_the_kernel_is_written_in_the_language_that_the_compiler_takes() -> None:
    assert not nki_emulator.lint_kernel(deltanet_chunk_step)
