# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The cost model against figures of the documentation."""

from __future__ import annotations

import pytest

from nki_emulator import costs


def test_a_full_bf16_matmul_runs_at_the_documented_peak() -> None:
    cost = costs.matmul(512, 128, ("bfloat16", "bfloat16"), (False, False))
    assert 2 * 128 * 128 * 512 / cost.busy_ns / 1000 == pytest.approx(79, rel=0.01)  # TFLOPS


@pytest.mark.parametrize(
    ("columns", "dtype", "onezero", "cycles"),
    [
        (512, "bfloat16", False, 512),
        (1, "bfloat16", False, 64),
        (512, "float32", False, 2048),
        (512, "float32", True, 1024),
    ],
)
def test_matmul_cycles(columns: int, dtype: str, onezero: bool, cycles: int) -> None:
    cost = costs.matmul(columns, 128, (dtype, dtype), (onezero, False))
    assert cost.busy_ns * costs.TENSOR_GHZ == pytest.approx(cycles)


@pytest.mark.parametrize(
    ("dtype", "in_psum", "contiguous", "cycles"),
    [
        ("float32", False, True, 1024),
        ("bfloat16", False, True, 256),
        ("bfloat16", True, True, 512),
        ("bfloat16", False, False, 512),
        ("bfloat16", True, False, 1024),
    ],
)
def test_vector_performance_modes(dtype: str, in_psum: bool, contiguous: bool, cycles: int) -> None:
    dst = costs.Tile(1024, dtype, False, True, 2)
    src = costs.Tile(1024, dtype, in_psum, contiguous, 2 if contiguous else 4)
    assert costs.vector_single_input(dst, src, fast_capable=True) == cycles


def test_wide_strides_halve_the_bandwidth() -> None:
    narrow = costs.Tile(100, "float32", False, False, 16)
    wide = costs.Tile(100, "float32", False, False, 20)
    assert costs.strided(100, narrow) == 100
    assert costs.strided(100, narrow, wide) == 200


def test_dma_efficiency_follows_the_documented_curve() -> None:
    def efficiency(chunk: int) -> float:
        total = 128 * chunk
        return total / (16 * 23) / costs.dma_engine_ns(total, chunk, 16)

    assert efficiency(4) < 0.02
    assert efficiency(255) < 0.45
    assert 0.8 < efficiency(2048) < 0.9
    assert efficiency(4096) > 0.9


def test_every_constant_has_a_source() -> None:
    table = costs.constants()
    assert len(table) > 40
    for name, _, unit, source in table:
        assert unit, name
        assert source.startswith(("nki/", "about-neuron/", "inferred")), (name, source)
