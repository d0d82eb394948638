# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The cost model against figures of the documentation."""

from __future__ import annotations

import pytest

from nki_emulator import costs
from nki_emulator.enums import engine

PLACES = ("nki/", "about-neuron/", "tools/", "benchmarks/", "github:", "nki-library")


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
        ("float32", False, True, 512),
        ("float32", True, True, 1024),
        ("float32", False, False, 1024),
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


def test_two_inputs_cost_what_the_profile_shows() -> None:
    half, product = costs.Tile(512, "bfloat16", False, True, 2), costs.Tile(512, "float32", True, True, 4)
    # The profile of design-rmsnorm-quant.rst: one every 660 ns.
    cost = costs.elementwise(engine.vector, costs.vector_two_inputs(half, half, product))
    assert cost.busy_ns == pytest.approx(660, rel=0.01)


def test_long_vector_instructions_cost_what_the_profile_shows() -> None:
    half, eighth = costs.Tile(16384, "bfloat16", False, True, 2), costs.Tile(16384, "float8_e4m3", False, True, 1)
    reduction = costs.elementwise(engine.vector, costs.vector_single_input(half, half, fast_capable=False))
    quantisation = costs.elementwise(engine.vector, costs.vector_single_input(eighth, half, fast_capable=True))
    # The profile of design-rmsnorm-quant.rst: 17.2 us and 8.8 us.
    assert reduction.busy_ns == pytest.approx(17_200, rel=0.01)
    assert quantisation.busy_ns == pytest.approx(8_780, rel=0.02)


@pytest.mark.parametrize(
    ("engines", "cores", "hbm", "rate"),
    [(16, 1, True, 27.2), (16, 2, True, 362.5 / 16), (10, 2, True, 27.2), (16, 2, False, 27.2)],
)
def test_two_cores_share_an_hbm(engines: int, cores: int, hbm: bool, rate: float) -> None:
    assert costs.dma_bytes_per_ns(engines, cores, hbm=hbm) == pytest.approx(rate)


def test_an_instruction_on_the_one_before_waits_as_documented() -> None:
    vector, scalar = costs.elementwise(engine.vector, 1), costs.elementwise(engine.scalar, 1)
    # Two dependent ones of a single element take 370 ns in the profile of design-rmsnorm-quant.rst.
    assert 2 * (vector.busy_ns + vector.latency_ns) == pytest.approx(370, rel=0.05)
    assert (scalar.busy_ns + scalar.latency_ns) * costs.SCALAR_GHZ == pytest.approx(264)


def test_wide_strides_halve_the_bandwidth() -> None:
    narrow = costs.Tile(100, "float32", False, False, 16)
    wide = costs.Tile(100, "float32", False, False, 20)
    assert costs.strided(100, narrow) == 100
    assert costs.strided(100, narrow, wide) == 200


def test_dma_efficiency_follows_the_documented_curve() -> None:
    def efficiency(chunk: int) -> float:
        total = 128 * chunk
        return total / (16 * costs.DMA_ENGINE_BYTES_PER_NS) / costs.dma_engine_ns(total, chunk, 16)

    assert efficiency(4) < 0.02
    assert efficiency(255) < 0.45
    assert 0.8 < efficiency(2048) < 0.9
    assert efficiency(4096) > 0.9


def test_every_constant_has_a_source() -> None:
    table = costs.constants()
    assert len(table) > 40
    for name, constant in table.items():
        assert constant.unit, name
        if constant.kind is costs.Kind.INFERRED:
            assert constant.source, name
        else:
            assert any(where in constant.source for where in PLACES), (name, constant.source)


def test_two_constants_are_fitted_and_none_scales_the_rest() -> None:
    fitted = [name for name, c in costs.constants().items() if c.kind is costs.Kind.FITTED]
    assert fitted == ["LAUNCH_LNC1_NS", "DMA_ELEMENT_NS"]
    assert costs.launch_ns(1) < costs.launch_ns(2)
