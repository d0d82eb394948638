# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Verification of several tokens in the emulator, against the formulas of the layer in float64, token by token.

Letters: B batch, T tokens of a step, H value heads, Hk key heads of a rank; K = V = 128. All times are modelled.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.decode_layer import deltanet_decode_layer
from qwen35.nki_kernels.verify_layer import deltanet_verify_layer
from qwen35.ops import causal_conv, decay_and_beta, verify_delta_rule
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
    silu,
    strong_decay,
)
from support.kernel_cases import assert_near


def run(step: Step, grid: int | None, timed: bool = False) -> nki_emulator.EmulationResult:
    return nki_emulator.emulate(deltanet_verify_layer, *step.tensors(), grid=grid, timed=timed)


def states_of(step: Step, keys: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The state after every token by what the kernel returned, [B, T, H, K, V] in float64."""
    B, T, H, Hk = step.sizes
    assert keys.shape == (B, T, Hk, D) and u.shape == (B, T, H, D) and g.shape == (B, T, H)
    assert keys.dtype == u.dtype == g.dtype == torch.float32
    S, states = step.state.double(), []
    for t in range(T):
        k = keys[:, t].double().repeat_interleave(H // Hk, 1)
        S = g[:, t].double().exp()[..., None, None] * S + k[..., None] * u[:, t].double()[..., None, :]
        states.append(S)
    return torch.stack(states, 1)


def check(step: Step, grid: int | None, tolerance: float | None = None) -> None:
    output, keys, u, g = run(step, grid).outputs
    expected_output, expected_states, _ = naive(step)
    assert output.dtype == step.z.dtype
    assert_near(output, expected_output, TOLERANCE[step.qkv.dtype] if tolerance is None else tolerance, "output")
    assert_near(states_of(step, keys, u, g), expected_states, STATE_TOLERANCE, "states")


@pytest.mark.parametrize("T", range(1, 9))
def test_any_number_of_tokens_is_the_formula(T: int) -> None:
    check(make(1, T, 3, 1), 2)


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "T", "H", "Hk", "dtype"),
    [
        (1, 4, 6, 2, torch.bfloat16),
        (2, 3, 3, 1, torch.float32),
        (3, 2, 6, 2, torch.bfloat16),  # split by key heads, three sequences in a box
        (3, 4, 2, 1, torch.float32),  # split by value heads
        (1, 5, 1, 1, torch.float32),  # nothing for the other core
        (2, 8, 12, 4, torch.float32),  # two boxes of a sequence, the second of one group less
    ],
    ids=str,
)
def test_sequences_heads_and_cores_are_the_formula(
    B: int, T: int, H: int, Hk: int, dtype: torch.dtype, grid: int | None
) -> None:
    check(make(B, T, H, Hk, dtype), grid)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "T", "H", "Hk", "dtype"),
    [
        (8, 4, 12, 4, torch.bfloat16),
        (5, 8, 12, 4, torch.float32),
        (16, 2, 12, 4, torch.bfloat16),
        (1, 8, 48, 16, torch.float32),
        (8, 8, 3, 1, torch.float32),
    ],
    ids=str,
)
def test_large_steps_are_the_formula(B: int, T: int, H: int, Hk: int, dtype: torch.dtype, grid: int | None) -> None:
    check(make(B, T, H, Hk, dtype), grid)


def test_a_sequence_starts_from_zero() -> None:
    step = make(1, 4, 6, 2, zero=True)
    check(replace(step, conv_state=torch.zeros_like(step.conv_state)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a", [-30.0, 0.0, 5.0, 60.0, 1e4])
def test_no_decay_is_too_strong(a: float, dtype: torch.dtype) -> None:
    check(strong_decay(make(1, 3, 3, 1, dtype), a), 2, tolerance=HARD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_keys_written_at_full_strength_do_not_build_up_error(dtype: torch.dtype) -> None:
    check(equal_keys(make(1, 8, 3, 1, dtype)), 2, tolerance=HARD_TOLERANCE[dtype])


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (6, 2), (3, 1), (2, 1)], ids=str)
def test_a_broken_row_leaves_its_neighbours_alone(H: int, Hk: int) -> None:
    step = make(4, 4, H, Hk)
    for row in (1, 2):
        others = [i for i in range(4) if i != row]
        for whole, broken in zip(run(step, None).outputs, run(broken_row(step, row), None).outputs, strict=True):
            assert torch.equal(whole[others], broken[others])


def test_a_padded_row_of_zeros_stays_finite() -> None:
    step = make(2, 4, 3, 1)
    for x in (step.qkv, step.conv_state, step.z):
        x[1] = 0
    check(step, 2)


def test_a_token_depends_on_none_after_it() -> None:
    step = make(1, 4, 3, 1)
    other = replace(step, **{x: getattr(step, x).clone() for x in ("qkv", "z", "a", "b")})
    for x in (other.qkv, other.z, other.a, other.b):
        x[:, 2:] = torch.randn_like(x[:, 2:])
    for one, two in zip(run(step, 2).outputs, run(other, 2).outputs, strict=True):
        assert torch.equal(one[:, :2], two[:, :2])


def test_the_kernel_agrees_with_the_operators_that_the_layer_calls() -> None:
    step = make(2, 4, 6, 2)
    mixed, _ = causal_conv(step.qkv, step.conv_weight, step.conv_state)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in mixed.split((2 * D, 2 * D, 6 * D), dim=-1))
    g, beta = decay_and_beta(step.a, step.b, step.A_log, step.dt_bias)
    o, keys, u = verify_delta_rule(q, k, v, g, beta, step.state)
    normed = torch.nn.functional.rms_norm(o, (D,), step.norm_weight, EPS) * silu(step.z.unflatten(-1, (-1, D)))
    output, kernel_keys, kernel_u, kernel_g = run(step, 2).outputs
    assert_near(output, normed.flatten(2).double(), 1e-5, "output")  # float32 on both sides
    assert_near(kernel_g, g.double(), 1e-6, "g")
    # Their keys differ by a factor, so what both write into the state is compared.
    assert_near(
        states_of(step, kernel_keys, kernel_u, kernel_g), states_of(step, keys, u, g), STATE_TOLERANCE, "states"
    )


def test_inputs_are_left_alone() -> None:
    step = make(1, 2, 3, 1)
    before = [x.clone() for x in step.tensors()]
    run(step, 2)
    assert all(torch.equal(x, y) for x, y in zip(step.tensors(), before, strict=True))


def test_more_than_eight_tokens_are_refused() -> None:
    with pytest.raises(AssertionError, match="qkv has 9 tokens of each sequence: 1 to 8 are possible"):
        run(make(1, 9, 3, 1), 2)


# --- What the machine allows -----------------------------------------------------------------------------------------
def test_the_kernel_is_written_in_the_nki_language() -> None:
    assert nki_emulator.lint_kernel(deltanet_verify_layer) == []


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (3, 1)], ids=["TP=4", "TP=16"])
@pytest.mark.parametrize(("B", "T"), [(1, 4), (1, 8), (8, 4)], ids=str)
def test_the_27b_shapes_fit_on_chip(B: int, T: int, H: int, Hk: int) -> None:
    """Emulation raises when SBUF or PSUM overflows; half of SBUF is left to whatever the compiler keeps there."""
    cores = run(make(B, T, H, Hk, torch.bfloat16), 2).report.cores
    assert max(core.peak_sbuf_bytes for core in cores) <= 96 * 1024
    assert max(core.peak_psum_banks for core in cores) <= 8


# --- Modelled time ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("B", "limit"), [(1, 1.25), (8, 1.5)])
def test_four_tokens_cost_less_than_two_of_the_decoding_kernel(B: int, limit: float) -> None:
    """Modelled, TP=4, bfloat16: the state is read once for all tokens, and not written."""
    step = make(B, 4, 12, 4, torch.bfloat16)
    one = replace(step, **{x: getattr(step, x)[:, :1].contiguous() for x in ("qkv", "z", "a", "b")})
    four = run(step, 2, timed=True).report.makespan_ns
    decode = nki_emulator.emulate(deltanet_decode_layer, *one.tensors(), grid=2, timed=True).report.makespan_ns
    print(f"B={B}: verification of 4 tokens {four / 1000:.2f} us, decoding of one {decode / 1000:.2f} us")
    assert four <= limit * decode


def test_the_state_is_read_once_and_not_written() -> None:
    step = make(2, 4, 3, 1, torch.bfloat16)
    result = run(step, 2, timed=True)
    state = step.state.numel() * 4
    small = sum(x.numel() * x.element_size() for x in step.tensors()[:-1])
    assert state <= sum(core.hbm_bytes_read for core in result.report.cores) <= state + 2 * small
    written = sum(x.numel() * x.element_size() for x in result.outputs)
    assert sum(core.hbm_bytes_written for core in result.report.cores) == written < state
