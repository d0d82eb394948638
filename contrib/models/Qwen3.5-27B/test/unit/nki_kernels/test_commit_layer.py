# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The states after verification in the emulator, against the recurrence of the layer in float64.

Letters: B batch, T tokens of a step, H value heads, Hk key heads of a rank; K = V = 128. All times are modelled.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.commit_layer import deltanet_commit_layer
from qwen35.nki_kernels.decode_layer import deltanet_decode_layer
from qwen35.nki_kernels.verify_layer import deltanet_verify_layer
from qwen35.ops import commit_conv, commit_delta_rule
from support.decode_cases import STATE_TOLERANCE, D, Step, equal_keys, make, naive, strong_decay
from support.kernel_cases import assert_near


def verified(step: Step, grid: int | None) -> list[Tensor]:
    """The arguments of the kernel but for the counts, from verification of a step."""
    _, keys, u, g = nki_emulator.emulate(deltanet_verify_layer, *step.tensors(), grid=grid, timed=False).outputs
    return [keys, u, g, step.state, step.qkv, step.conv_state]


def commit(
    arguments: list[Tensor], accepted: Sequence[int], grid: int | None, timed: bool = False
) -> nki_emulator.EmulationResult:
    counts = torch.tensor(accepted, dtype=torch.int32)
    return nki_emulator.emulate(deltanet_commit_layer, *arguments, counts, grid=grid, timed=timed)


def check(step: Step, accepted: Sequence[int], grid: int | None) -> None:
    """Verify the tokens of a step, accept some, and compare with the recurrence over those alone."""
    state, conv_state = commit(verified(step, grid), accepted, grid).outputs
    _, states, _ = naive(step)
    states = torch.cat((step.state.double()[:, None], states), dim=1)
    inputs = torch.cat((step.conv_state, step.qkv.mT), dim=2)
    for b, n in enumerate(accepted):
        assert_near(state[b], states[b, n], STATE_TOLERANCE, f"state of row {b} after {n} tokens")
        assert torch.equal(conv_state[b], inputs[b, :, n : n + 3]), "the conv state is moved, not computed"


@pytest.mark.parametrize("T", range(1, 9))
def test_any_number_of_tokens_can_be_accepted(T: int) -> None:
    step = make(1, T, 3, 1)
    for n in range(T + 1):
        check(step, [n], 2)


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "T", "H", "Hk", "dtype"),
    [
        (4, 4, 3, 1, torch.bfloat16),
        (3, 3, 6, 2, torch.float32),  # split by key heads
        (3, 5, 2, 1, torch.bfloat16),  # split by value heads
        (1, 2, 1, 1, torch.float32),  # nothing for the other core
        (4, 4, 12, 4, torch.bfloat16),  # groups of eight heads, some of two sequences
    ],
    ids=str,
)
def test_rows_accept_different_numbers(B: int, T: int, H: int, Hk: int, dtype: torch.dtype, grid: int | None) -> None:
    check(make(B, T, H, Hk, dtype), [(3 * b + 1) % (T + 1) for b in range(B)], grid)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "T", "H", "Hk"), [(8, 8, 12, 4), (5, 4, 12, 4), (16, 3, 12, 4), (1, 8, 48, 16), (8, 7, 3, 1)], ids=str
)
def test_large_steps_are_the_recurrence(B: int, T: int, H: int, Hk: int, grid: int | None) -> None:
    check(make(B, T, H, Hk, torch.bfloat16), [(3 * b + 1) % (T + 1) for b in range(B)], grid)


@pytest.mark.parametrize("a", [-30.0, 5.0, 60.0, 1e4])
def test_no_decay_is_too_strong(a: float) -> None:
    check(strong_decay(make(2, 3, 3, 1), a), [3, 2], 2)


def test_equal_keys_written_at_full_strength_do_not_build_up_error() -> None:
    check(equal_keys(make(2, 8, 3, 1)), [8, 5], 2)


def test_the_kernel_agrees_with_the_operators_that_the_layer_calls() -> None:
    arguments = verified(make(3, 4, 6, 2), 2)
    keys, u, g, state, qkv, conv_state = arguments
    counts = torch.tensor([0, 4, 2])
    new_state, new_conv_state = commit(arguments, counts.tolist(), 2).outputs
    assert_near(new_state, commit_delta_rule(keys, u, g, state, counts).double(), 1e-6, "state")
    assert torch.equal(new_conv_state, commit_conv(qkv, conv_state, counts))


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (6, 2), (3, 1), (2, 1)], ids=str)
def test_a_broken_row_leaves_its_neighbours_alone(H: int, Hk: int) -> None:
    arguments = random_arguments(4, 4, H, Hk)
    whole = commit(arguments, [1, 2, 3, 4], None).outputs
    for row in (1, 2):
        broken = [x.clone() for x in arguments]
        for x in broken:
            x[row] = torch.nan
        others = [i for i in range(4) if i != row]
        for x, y in zip(whole, commit(broken, [1, 2, 3, 4], None).outputs, strict=True):
            assert torch.equal(x[others], y[others])


def test_a_row_with_nothing_accepted_keeps_both_states_to_the_bit() -> None:
    step = make(2, 4, 3, 1)
    state, conv_state = commit(verified(step, 2), [0, 4], 2).outputs
    assert torch.equal(state[0], step.state[0]) and torch.equal(conv_state[0], step.conv_state[0])


def test_inputs_are_left_alone() -> None:
    arguments = verified(make(1, 2, 3, 1), 2)
    before = [x.clone() for x in arguments]
    commit(arguments, [1], 2)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def test_counts_of_another_type_are_refused() -> None:
    arguments = verified(make(1, 2, 3, 1), 2)
    with pytest.raises(AssertionError, match=r"accepted must be \[1\] int32"):
        nki_emulator.emulate(deltanet_commit_layer, *arguments, torch.tensor([1.0]), grid=2)


# --- What the machine allows -----------------------------------------------------------------------------------------
def test_the_kernel_is_written_in_the_nki_language() -> None:
    assert nki_emulator.lint_kernel(deltanet_commit_layer) == []


def random_arguments(B: int, T: int, H: int, Hk: int) -> list[Tensor]:
    channels = (2 * Hk + H) * D
    wide = [torch.randn(B, T, Hk, D), torch.randn(B, T, H, D), -torch.rand(B, T, H), torch.randn(B, H, D, D)]
    return [*wide, torch.randn(B, T, channels).bfloat16(), torch.randn(B, channels, 3).bfloat16()]


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (3, 1)], ids=["TP=4", "TP=16"])
@pytest.mark.parametrize(("B", "T"), [(1, 8), (8, 4), (8, 8)], ids=str)
def test_the_27b_shapes_fit_on_chip(B: int, T: int, H: int, Hk: int) -> None:
    """Emulation raises when SBUF or PSUM overflows; half of SBUF is left to whatever the compiler keeps there."""
    cores = commit(random_arguments(B, T, H, Hk), [T] * B, 2).report.cores
    assert max(core.peak_sbuf_bytes for core in cores) <= 96 * 1024
    assert max(core.peak_psum_banks for core in cores) <= 8


# --- Modelled time ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("B", [1, 8])
def test_a_commit_of_four_tokens_costs_about_what_a_decoding_step_does(B: int) -> None:
    """Modelled, TP=4, bfloat16: it reads and writes the state as a step does, without its dependent chain."""
    step = make(B, 1, 12, 4, torch.bfloat16)
    committed = commit(random_arguments(B, 4, 12, 4), [3] * B, 2, timed=True).report.makespan_ns
    decode = nki_emulator.emulate(deltanet_decode_layer, *step.tensors(), grid=2, timed=True).report.makespan_ns
    print(f"B={B}: commit of 4 tokens {committed / 1000:.2f} us, decoding of one {decode / 1000:.2f} us")
    assert committed <= 1.15 * decode


def test_the_state_is_read_once_and_written_once() -> None:
    arguments = random_arguments(2, 4, 3, 1)
    cores = commit(arguments, [2, 4], 2, timed=True).report.cores
    state = arguments[3].numel() * 4
    small = sum(x.numel() * x.element_size() for x in arguments) - state
    assert state <= sum(core.hbm_bytes_read for core in cores) <= state + 3 * small  # keys once for each value head
    assert state <= sum(core.hbm_bytes_written for core in cores) <= state + small
