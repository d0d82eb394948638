# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual registers, and the classes that a kernel may use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate
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
