# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The programs of a launch, and instructions outside of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate, jit, simulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import grid_data, tile


def test_programs_share_hbm_and_split_work() -> None:
    @jit
    def kernel(a: Any) -> Any:
        half = a.shape[0] // nl.num_programs(0)
        start = nl.program_id(0) * half
        out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
        t = tile(a[start : start + half])
        nisa.tensor_scalar(t, t, nl.multiply, 2.0)
        nisa.dma_copy(dst=out[start : start + half], src=t)
        assert (nl.program_ndim(), nl.num_programs(None)) == (1, 2)
        return out

    x = grid_data(64, 8)
    np.testing.assert_array_equal(kernel[2](x), 2 * x)
    np.testing.assert_array_equal(simulate(kernel[2])(x), 2 * x)
    assert len(emulate(kernel, x, grid=2).report.cores) == 2


def test_a_core_that_waits_for_nobody_is_reported() -> None:
    def kernel() -> None:
        shared = nl.ndarray((1, 4), nl.float32, buffer=nl.shared_hbm)
        if nl.program_id(0) == 0:
            nisa.core_barrier(shared, (0, 1))

    with pytest.raises(RuntimeError, match="program 0 waits at core_barrier, which another program never reaches"):
        emulate(kernel, grid=2)


def test_cores_at_different_meeting_points_are_reported() -> None:
    def kernel() -> None:
        me = nl.program_id(0)
        a, b = nl.zeros((4, 4), nl.float32), nl.ndarray((4, 4), nl.float32)
        nisa.sendrecv(src=a, dst=b, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=me)

    with pytest.raises(RuntimeError, match="waits at sendrecv"):
        emulate(kernel, grid=2)


def test_instructions_outside_a_kernel_say_so() -> None:
    with pytest.raises(RuntimeError, match="no kernel is running"):
        nl.ndarray((1, 1), nl.float32)
