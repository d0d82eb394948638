# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Helpers of the emulator's tests: run one instruction on tiles, seeded inputs, tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from nki_emulator import Report, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from nki_emulator.engine import Instruction

BF16 = ml_dtypes.bfloat16

BF16_ONCE = 2.0**-8
"""One rounding to bf16 has relative error 2**-9; two operations in float32 before it add nothing visible."""

F32_SUM = 1e-5
"""Sums of a few hundred float32 terms in another order."""

SHAPES = [(128, 512), (1, 1), (128, 1), (33, 7), (64, 130)]
DTYPES = [np.float32, BF16, np.float16]


def data(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal values; the same seed gives the same ones."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grid_data(*shape: int) -> np.ndarray:
    """0, 1, 2, ... in float32: every element is another one."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def f64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def items(report: Report, core: int = 0) -> list[Instruction]:
    """The instructions of a core in program order."""
    return list(report.instructions[core])


def tile(array: Any, buffer: Any = nl.sbuf) -> Any:
    """An HBM array as a tile in ``buffer``."""
    loaded = nl.ndarray(array.shape, array.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=array)
    if buffer == nl.sbuf:
        return loaded
    moved = nl.ndarray(array.shape, array.dtype, buffer=buffer)
    nisa.tensor_copy(dst=moved, src=loaded)
    return moved


def store(t: Any) -> Any:
    """A tile as a result of the kernel."""
    out = nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm)
    if t.buffer == nl.psum:
        copy = nl.ndarray(t.shape, t.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=copy, src=t)
        t = copy
    nisa.dma_copy(dst=out, src=t)
    return out


def run(
    call: Callable[..., Any],
    *inputs: np.ndarray,
    out: Sequence[int],
    dtype: str = "float32",
    buffers: Sequence[Any] = (),
    out_buffer: Any = nl.sbuf,
    **options: Any,
) -> np.ndarray:
    """Result of ``call(dst, *tiles)`` on tiles of ``inputs``.

    Args:
        call: issues the instruction.
        inputs: arrays ``[P, F]``.
        out, dtype, out_buffer: the destination tile.
        buffers: memory of each input, SBUF by default.
        options: of ``emulate``.
    """

    def kernel(*arrays: Any) -> Any:
        places = [*buffers, *[nl.sbuf] * (len(arrays) - len(buffers))]
        tiles = [tile(a, b) for a, b in zip(arrays, places, strict=True)]
        dst = nl.ndarray(out, dtype, buffer=out_buffer)
        call(dst, *tiles)
        return store(dst)

    return emulate(kernel, *inputs, **options).outputs


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Largest error relative to the largest expected value; on failure names the worst element and both values."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape, f"shape {a.shape}, expected {e.shape}"
    scale = max(float(np.abs(e).max()), 1e-30)
    error = np.abs(a - e)
    worst = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), a.shape)
    index = tuple(int(i) for i in worst)
    assert error[worst] <= tolerance * scale, f"at {index}: {a[worst]} instead of {e[worst]} (limit {tolerance:g})"
