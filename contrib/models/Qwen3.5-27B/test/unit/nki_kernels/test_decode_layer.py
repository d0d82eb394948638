# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decode step of a layer in the emulator, against the formulas of the layer in float64.

Letters: B batch, T tokens of a step, H value heads, Hk key heads of a rank; K = V = 128. All times are modelled.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.decode_layer import deltanet_decode_layer
from qwen35.ops import causal_conv, decay_and_beta, recurrent_gated_delta_rule
from support.decode_cases import (
    EPS,
    HARD_TOLERANCE,
    STATE_TOLERANCE,
    TOLERANCE,
    D,
    Step,
    broken_row,
    equal_keys,
    make,
    naive,
    one_token,
    silu,
    strong_decay,
)
from support.kernel_cases import assert_near

HBM_BYTES_PER_NS = 2 * 360  # a logical core of two physical ones; Trainium2 has 2.9 TB/s for eight


def run(step: Step, grid: int | None, timed: bool = False) -> nki_emulator.EmulationResult:
    return nki_emulator.emulate(deltanet_decode_layer, *step.tensors(), grid=grid, timed=timed)


def check(step: Step, grid: int | None, tolerance: float | None = None) -> None:
    output, state, conv_state = run(step, grid).outputs
    expected_output, expected_states, expected_conv_state = naive(step)
    assert output.dtype == step.z.dtype and state.dtype == torch.float32
    assert_near(output, expected_output, TOLERANCE[step.qkv.dtype] if tolerance is None else tolerance, "output")
    assert_near(state, expected_states[:, -1], STATE_TOLERANCE, "state")
    assert torch.equal(conv_state.double(), expected_conv_state), "the conv state is moved, not computed"


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize(("H", "Hk"), [(3, 1), (6, 2), (2, 1), (1, 1)], ids=str)
def test_one_token_is_the_formula(B: int, H: int, Hk: int, grid: int | None) -> None:
    check(make(B, 1, H, Hk), grid)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_bfloat16_operands_cost_the_rounding_of_the_output(B: int) -> None:
    check(make(B, 1, 6, 2, torch.bfloat16), 2)


@pytest.mark.parametrize("H", [4, 8])
def test_heads_are_packed_by_four_and_by_eight(H: int) -> None:
    check(make(2, 1, H, H // 2), 2)


def test_several_steps_are_the_formula() -> None:
    step = make(2, 4, 3, 1)
    expected_outputs, expected_states, expected_conv_state = naive(step)
    state, conv_state = step.state, step.conv_state
    for t in range(4):
        output, state, conv_state = run(replace(one_token(step, t), state=state, conv_state=conv_state), 2).outputs
        assert_near(output[:, 0], expected_outputs[:, t], 1e-5, f"output of token {t}")
        assert_near(state, expected_states[:, t], STATE_TOLERANCE, f"state after token {t}")
    assert torch.equal(conv_state.double(), expected_conv_state)


def test_a_sequence_starts_from_zero() -> None:
    step = make(1, 1, 6, 2, zero=True)
    check(replace(step, conv_state=torch.zeros_like(step.conv_state)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a", [-30.0, 0.0, 5.0, 60.0, 1e4])
def test_no_decay_is_too_strong(a: float, dtype: torch.dtype) -> None:
    check(strong_decay(make(1, 1, 3, 1, dtype), a), 2, tolerance=HARD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_keys_written_at_full_strength_do_not_build_up_error(dtype: torch.dtype) -> None:
    step = equal_keys(make(1, 8, 3, 1, dtype))
    _, expected_states, _ = naive(step)
    state, conv_state = step.state, step.conv_state
    for t in range(8):
        _, state, conv_state = run(replace(one_token(step, t), state=state, conv_state=conv_state), 2).outputs
        assert_near(state, expected_states[:, t], STATE_TOLERANCE, f"state after token {t}")


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (6, 2), (3, 1), (2, 1)], ids=str)
def test_a_broken_row_leaves_its_neighbours_alone(H: int, Hk: int) -> None:
    step = make(4, 1, H, Hk)
    for row in (1, 2):
        others = [i for i in range(4) if i != row]
        for whole, broken in zip(run(step, None).outputs, run(broken_row(step, row), None).outputs, strict=True):
            assert torch.equal(whole[others], broken[others])


def test_a_padded_row_of_zeros_stays_finite() -> None:
    step = make(2, 1, 3, 1)
    for x in (step.qkv, step.conv_state, step.z):
        x[1] = 0
    check(step, 2)


def test_the_kernel_agrees_with_the_operators_that_the_layer_calls() -> None:
    step = make(2, 1, 6, 2)
    mixed, conv_state = causal_conv(step.qkv, step.conv_weight, step.conv_state)
    q, k, v = mixed.split((2 * D, 2 * D, 6 * D), dim=-1)
    g, beta = decay_and_beta(step.a, step.b, step.A_log, step.dt_bias)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    o, state = recurrent_gated_delta_rule(q, k, v, g, beta, step.state)
    normed = torch.nn.functional.rms_norm(o, (D,), step.norm_weight, EPS) * silu(step.z.unflatten(-1, (-1, D)))
    outputs = run(step, 2).outputs
    assert_near(outputs[0], normed.flatten(2).double(), 1e-5, "output")  # float32 on both sides
    assert_near(outputs[1], state.double(), 1e-5, "state")
    assert torch.equal(outputs[2], conv_state)


def test_inputs_are_left_alone() -> None:
    step = make(1, 1, 3, 1)
    before = [x.clone() for x in step.tensors()]
    run(step, 2)
    assert all(torch.equal(x, y) for x, y in zip(step.tensors(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "H", "Hk", "dtype"),
    [
        (5, 12, 4, torch.float32),  # split by key heads, in several boxes
        (16, 12, 4, torch.bfloat16),  # two boxes per core
        (8, 3, 1, torch.float32),
        (1, 48, 16, torch.float32),
    ],
    ids=str,
)
def test_large_steps_are_the_formula(B: int, H: int, Hk: int, dtype: torch.dtype, grid: int | None) -> None:
    check(make(B, 1, H, Hk, dtype), grid)


def test_more_tokens_are_refused() -> None:
    with pytest.raises(AssertionError, match="qkv has 2 tokens of each sequence: one is needed"):
        run(make(1, 2, 3, 1), 2)


# --- What the machine allows -----------------------------------------------------------------------------------------
def test_the_kernel_is_written_in_the_nki_language() -> None:
    assert nki_emulator.lint_kernel(deltanet_decode_layer) == []


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (3, 1)], ids=["TP=4", "TP=16"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_27b_shapes_fit_on_chip(B: int, H: int, Hk: int, dtype: torch.dtype) -> None:
    """Emulation raises when SBUF or PSUM overflows; half of SBUF is left to whatever the compiler keeps there."""
    cores = run(make(B, 1, H, Hk, dtype), 2).report.cores
    assert max(core.peak_sbuf_bytes for core in cores) <= 96 * 1024
    assert max(core.peak_psum_banks for core in cores) <= 8


# --- Modelled time ---------------------------------------------------------------------------------------------------
def hbm_bound_ns(step: Step, outputs: tuple[Tensor, ...]) -> float:
    """Time to read every input once and to write every output once."""
    return sum(x.numel() * x.element_size() for x in (*step.tensors(), *outputs)) / HBM_BYTES_PER_NS


def show(B: int, H: int, Hk: int) -> float:
    """Print modelled time, bounds and use of engines of a bfloat16 step; returns time over the larger bound."""
    step = make(B, 1, H, Hk, torch.bfloat16)
    result = run(step, 2, timed=True)
    report = result.report
    hbm, latency, time = hbm_bound_ns(step, result.outputs), report.latency_bound_ns, report.makespan_ns
    used = {name: f"{use.utilisation:.0%}" for name, use in report.cores[0].engines.items() if use.busy_ns}
    print(f"B={B}: {time / 1000:.2f} us, HBM bound {hbm / 1000:.2f} us, latency bound {latency / 1000:.2f} us, {used}")
    return time / max(hbm, latency)


@pytest.mark.parametrize(("B", "limit"), [(1, 1.4), (8, 1.25)])
def test_a_step_takes_little_longer_than_its_bound(B: int, limit: float) -> None:
    """Modelled, TP=4. At B=1 the bound is the chain of loads, dependent instructions and stores, at B=8 the traffic.

    In so short a kernel as B=1 the Tensor engine stays at half speed, which that bound leaves out.
    """
    assert show(B, 12, 4) <= limit


def test_the_state_is_read_once_and_written_once() -> None:
    step = make(2, 1, 3, 1, torch.bfloat16)
    cores = run(step, 2, timed=True).report.cores
    state = step.state.numel() * 4
    small = sum(x.numel() * x.element_size() for x in step.tensors()[:-1])
    assert state <= sum(core.hbm_bytes_read for core in cores) <= state + 2 * small
    assert state <= sum(core.hbm_bytes_written for core in cores) <= state + small
