# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels of whole sequences in the emulator, against the recurrence written out token by token in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.chunk_pieces import PLAIN, TILED
from qwen35.nki_kernels.fused_chunked import (
    deltanet_fused_chunked_fwd,
    deltanet_fused_chunked_layer,
    deltanet_fused_chunked_layer_ragged,
    deltanet_fused_chunked_layer_state,
)
from qwen35.nki_kernels.nki_seam import EMULATED
from support.compare import assert_close
from support.kernel_cases import TOLERANCE, TOLERANCE_EQUAL_KEYS, Case, check, make_case, naive

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
INVERSES = pytest.mark.parametrize("inverse", [TILED, PLAIN])
KERNELS = [
    deltanet_fused_chunked_fwd,
    deltanet_fused_chunked_layer,
    deltanet_fused_chunked_layer_ragged,
    deltanet_fused_chunked_layer_state,
]


def run_layer(
    case: Case, lengths: Tensor | None = None, grid: int | None = None, inverse: str = TILED
) -> tuple[Tensor, Tensor]:
    """By the kernel for what there is: a state, valid lengths, or neither."""
    kernel, arguments = deltanet_fused_chunked_layer, [*case.tensors]
    if case.state is not None:
        kernel, arguments = deltanet_fused_chunked_layer_state, [*arguments, case.state]
    if lengths is not None:
        assert case.state is not None, "the ragged kernel takes a state"
        kernel, arguments = deltanet_fused_chunked_layer_ragged, [*arguments, lengths]
    return nki_emulator.emulate(kernel, *arguments, grid=grid, timed=False, inverse=inverse).outputs


@DTYPES
@INVERSES
@pytest.mark.parametrize("gates", ["none", "mild", "strong", "extreme", "rare"])
def test_the_layer_is_the_recurrence_for_any_decay(gates: str, inverse: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, gates=gates, state=True)
    check(run_layer(case, inverse=inverse), naive(case), TOLERANCE[dtype])


@DTYPES
@INVERSES
@pytest.mark.parametrize("keys", ["equal", "alike"])
def test_equal_and_correlated_keys_with_beta_near_one_stay_accurate(
    keys: str, inverse: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype=dtype, gates="weak", keys=keys, K=128, V=64)
    check(run_layer(case, inverse=inverse), naive(case), TOLERANCE_EQUAL_KEYS[dtype])


def test_small_decays_after_large_ones_are_exact() -> None:
    # After g = -80, differences of one running sum are good to 80 * 2^-24 = 5e-6 each, and 1e-4 of the output after
    # a few; sums between two tokens are not touched by what lies before them.
    case = make_case(S=128, R=1)
    case.g.fill_(-1e-3)
    case.g[:, :60] = -80
    check(run_layer(case), naive(case), 1e-6)


@pytest.mark.parametrize("S", [1, 2, 31, 127, 128, 129, 300])
def test_any_number_of_tokens_is_taken(S: int) -> None:
    case = make_case(S=S, state=True)
    check(run_layer(case), naive(case), TOLERANCE[torch.float32])


def test_tokens_from_the_valid_length_on_leave_the_state_as_it_is() -> None:
    case = make_case(B=4, S=200, R=1, state=True)
    lengths = [200, 1, 128, 130]
    expected_o, expected_state = naive(case, lengths)
    o, state = run_layer(case, torch.tensor(lengths, dtype=torch.int32))
    for b, length in enumerate(lengths):
        check((o[b, :length], state[b]), (expected_o[b, :length], expected_state[b]), TOLERANCE[torch.float32])
    assert torch.isfinite(o).all()


@pytest.mark.parametrize(
    ("Hk", "R", "K", "V"),
    [(1, 1, 128, 128), (2, 3, 16, 16), (1, 3, 64, 128), (4, 2, 16, 32), (1, 6, 32, 16), (3, 1, 16, 64)],
)
def test_head_groups_and_dimensions_of_the_family_are_taken(Hk: int, R: int, K: int, V: int) -> None:
    case = make_case(S=130, Hk=Hk, R=R, K=K, V=V, state=True)
    check(run_layer(case), naive(case), TOLERANCE[torch.float32])


@INVERSES
@pytest.mark.parametrize(("Hk", "R"), [(2, 3), (1, 3), (1, 1)], ids=["even", "group split", "one core idle"])
def test_two_cores_give_what_one_gives(Hk: int, R: int, inverse: str) -> None:
    case = make_case(B=2, S=140, Hk=Hk, R=R, K=16, V=16, state=True)
    results = (run_layer(case, grid=grid, inverse=inverse) for grid in (None, 2))
    for one, two in zip(*results, strict=True):
        # The host's matrix products of other widths differ in the last bit.
        assert_close(two, one, atol=1e-6 * one.abs().max().item(), label="two cores")


def test_the_inputs_are_not_changed() -> None:
    case = make_case(S=130, state=True)
    before = [x.clone() for x in (*case.tensors, case.state)]
    run_layer(case, torch.tensor([100], dtype=torch.int32))
    for was, x in zip(before, (*case.tensors, case.state), strict=True):
        assert_close(x, was, label="input")


def test_zero_keys_and_queries_write_and_read_nothing() -> None:
    case = make_case(S=64)
    case.k[:, ::2] = 0
    case.q[:, ::3] = 0
    check(run_layer(case), naive(case), TOLERANCE[torch.float32])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scales=st.lists(st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 30.0, 90.0, 1e4]), min_size=1, max_size=4),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_gate_and_no_size_of_keys_gives_nan_or_overflow(
    seed: int, scales: list[float], size: float, dtype: torch.dtype
) -> None:
    case = make_case(S=140, R=1, K=16, V=16, dtype=dtype, seed=seed)
    case.k *= size
    per_token = torch.tensor(scales)[torch.arange(140) % len(scales)]
    case.g = -per_token[None, :, None] * torch.rand(1, 140, 1, generator=torch.Generator().manual_seed(seed))
    check(run_layer(case), naive(case), 3 * TOLERANCE[dtype])  # the worst of many, where 16 terms average less


def test_arguments_that_do_not_fit_are_named() -> None:
    case = make_case(S=8)
    case.beta = case.beta[:, :7]
    with pytest.raises(AssertionError, match="beta has shape"):
        run_layer(case)
    with pytest.raises(AssertionError, match=r"q, k, v are .* one type"):
        run_layer(Case(*(x.bfloat16() if i == 2 else x for i, x in enumerate(make_case(S=8).tensors))))
    with pytest.raises(AssertionError, match="inverse is exact: tiled or plain is needed"):
        run_layer(make_case(S=8), inverse="exact")
    with pytest.raises(AssertionError, match="valid_lengths is int16: int32 is needed"):
        run_layer(make_case(S=8, state=True), torch.tensor([8], dtype=torch.int16))


# --- One head --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [None, 2])
def test_the_single_head_kernel_is_the_layer_with_one_head(grid: int | None) -> None:
    case = make_case(S=150, R=1, K=128, V=128, state=True)
    assert case.state is not None
    head = [x[0, :, 0] for x in (case.q, case.k, case.v)] + [x[0] for x in (case.g, case.beta)]
    arguments = (*head, case.state[0, 0], torch.tensor([140], dtype=torch.int32))
    output, final = nki_emulator.emulate(deltanet_fused_chunked_fwd, *arguments, grid=grid, timed=False).outputs
    expected_o, expected_state = naive(case, [140])
    check((output[:140], final), (expected_o[0, :140, 0], expected_state[0, 0]), TOLERANCE[torch.float32])


# --- The 27B model on the machine ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_written_in_the_language_that_the_compiler_takes(kernel: object) -> None:
    assert not nki_emulator.lint_kernel(kernel)


PUBLISHED_NS = 151_480
"""Modelled time per head and 128 tokens of the published port's nki_deltanet_fused.py (aws-neuron/
neuronx-distributed-inference, 550e2ab), one head, 512 float32 tokens, 605.92 us, in the same emulator."""


@pytest.mark.parametrize(("H", "Hk", "grid", "faster"), [(12, 4, 2, 60), (12, 4, 1, 60), (3, 1, 1, 40), (3, 1, 2, 24)])
def test_27b_shapes_fit_on_chip_and_outrun_the_published_port(H: int, Hk: int, grid: int, faster: int) -> None:
    """The value heads of a rank at TP=4 and TP=16; core time counts both cores of LNC=2, idle or not."""
    case = make_case(S=512, Hk=Hk, R=H // Hk, K=128, V=128, dtype=torch.bfloat16)
    report = nki_emulator.emulate(deltanet_fused_chunked_layer, *case.tensors, grid=grid).report
    core_ns = report.makespan_ns * grid / (H * 512 / 128)
    assert core_ns < PUBLISHED_NS / faster, f"{core_ns:.0f} ns per head and chunk\n{report.table()}"


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("gates", ["mild", "extreme", "rare"])
@pytest.mark.parametrize("S", [1024, 2000, 2048])
def test_long_sequences_of_a_27b_rank(S: int, gates: str, dtype: torch.dtype) -> None:
    case = make_case(B=2, S=S, Hk=2, R=3, K=128, V=128, dtype=dtype, gates=gates, state=True)
    lengths = [S, S - 77]
    expected_o, expected_state = naive(case, lengths)
    o, state = run_layer(case, torch.tensor(lengths, dtype=torch.int32), grid=2)
    for b, length in enumerate(lengths):
        check((o[b, :length], state[b]), (expected_o[b, :length], expected_state[b]), TOLERANCE[dtype])
