# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual registers, and the classes that a kernel may use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiValidationError, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import data, store, tile


def test_registers_steer_loops_and_addresses() -> None:
    x, count = data((6, 5)), np.int32([[3]])

    def kernel(a: Any, n: Any) -> Any:
        limit = nisa.register_alloc()
        nisa.register_load(limit, tile(n))
        out = nl.ndarray((6, 5), a.dtype, buffer=nl.shared_hbm)
        zero = nl.zeros((6, 5), a.dtype)
        nisa.dma_copy(dst=out, src=zero)
        for i in nl.dynamic_range(limit):
            row = nl.ndarray((1, 5), a.dtype)
            nisa.dma_copy(dst=row, src=a.ap(pattern=[[5, 1], [1, 5]], scalar_offset=i))
            nisa.dma_copy(dst=out[nl.ds(i, 1), :], src=row)
        final = nisa.register_alloc(0)
        nisa.register_move(final, limit)
        cell = nl.ndarray((1, 1), nl.int32)
        nisa.register_store(cell, final)
        return out, store(cell)

    out, cell = emulate(kernel, x, count).outputs
    np.testing.assert_array_equal(out, np.concatenate([x[:3], np.zeros((3, 5), np.float32)]))
    assert int(cell[0, 0]) == 3


def test_the_body_of_a_device_loop_is_the_same_in_each_iteration() -> None:
    # It is compiled once: a Python list that takes turns would take the first buffer every time on a device.
    def kernel(fresh: bool) -> Any:
        buffers = [nl.ndarray((2, 4), nl.float32) for _ in range(2)]
        out = nl.ndarray((6, 4), nl.float32, buffer=nl.shared_hbm)
        taken = 0
        for i in nl.dynamic_range(3):
            buffer = nl.ndarray((2, 4), nl.float32) if fresh else buffers[taken % 2]
            taken += 1
            nisa.memset(dst=buffer, value=1.0)
            nisa.dma_copy(dst=out.ap(pattern=[[4, 2], [1, 4]], scalar_offset=i, indirect_dim=0), src=buffer)
        return out

    emulate(kernel, True)
    with pytest.raises(NkiValidationError, match="iteration 1 issues another body"):
        emulate(kernel, False)


def test_an_access_waits_for_the_tensor_that_holds_its_address() -> None:
    def kernel(a: Any, steps: int) -> Any:
        out = nl.ndarray((1, 5), a.dtype, buffer=nl.shared_hbm)
        offset, row = nl.ndarray((1, 1), nl.int32), nl.ndarray((1, 5), a.dtype)
        nisa.memset(dst=offset, value=0)
        for _ in range(steps):
            nisa.tensor_scalar(dst=offset, data=offset, op0=nl.add, operand0=1.0)
        nisa.dma_copy(dst=row, src=a.ap(pattern=[[5, 1], [1, 5]], scalar_offset=offset, indirect_dim=0))
        nisa.dma_copy(dst=out, src=row)
        return out

    x = data((6, 5))
    short, long = (emulate(kernel, x, steps) for steps in (1, 5))
    np.testing.assert_array_equal(long.outputs, x[5:6])
    instruction_ns = costs.elementwise(nisa.engine.vector, 1)  # one element, and until its result is visible
    four = 4 * (instruction_ns.busy_ns + instruction_ns.latency_ns)
    assert long.report.makespan_ns - short.report.makespan_ns == pytest.approx(four, rel=0.01)


def test_nki_objects_get_an_initialiser_as_from_the_compiler() -> None:
    class Plain(nl.NKIObject):
        rows: int
        columns: int = 4

        def __post_init__(self) -> None:
            self.size = (self.rows or 0) * self.columns

    assert Plain(3).size == 12
    assert Plain(columns=2).rows is None
    with pytest.raises(TypeError, match="has fields"):
        Plain(depth=1)
