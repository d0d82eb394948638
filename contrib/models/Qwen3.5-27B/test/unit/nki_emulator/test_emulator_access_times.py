# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Accesses to separate parts of one tensor do not wait for each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import items


def test_disjoint_columns_of_one_tile_are_independent() -> None:
    def kernel(disjoint: bool) -> None:
        t = nl.ndarray((128, 2, 1024), nl.float32)
        nisa.memset(t[:, 0], 0.0, engine=nisa.engine.vector)
        nisa.memset(t[:, 1 if disjoint else 0], 0.0, engine=nisa.engine.gpsimd)

    disjoint, same = (items(emulate(kernel, d).report) for d in (True, False))
    assert disjoint[1].start_ns == 0
    assert same[1].start_ns == same[0].end_ns


def test_rows_loaded_into_one_tile_are_independent() -> None:
    def kernel(a: Any) -> None:
        t = nl.ndarray((128, 64), nl.float32)
        for row in range(8):
            nisa.dma_copy(dst=t[row : row + 1], src=a[row : row + 1])
        nisa.tensor_copy(dst=t[32:64], src=t[0:32])
        nisa.memset(t[0:1], 0.0)

    report = emulate(kernel, np.zeros((8, 64), np.float32)).report
    *loads, copy, clear = items(report)
    assert {i.start_ns for i in loads} == {0.0}
    assert copy.start_ns == max(i.end_ns for i in loads)
    assert clear.start_ns > copy.start_ns


def test_interleaved_strides_are_independent() -> None:
    def kernel() -> None:
        t = nl.ndarray((128, 512, 2), nl.float32)
        nisa.memset(t[:, :, 0], 0.0, engine=nisa.engine.vector)
        nisa.memset(t[:, :, 1], 0.0, engine=nisa.engine.gpsimd)

    assert items(emulate(kernel).report)[1].start_ns == 0
