# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The causal convolution and the state it carries, against a loop over tokens in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qwen35.ops import causal_conv, commit_conv
from support.compare import assert_close

# Four products and a SiLU of values around 1, in float32 that rounds at 6e-8.
TOLERANCE = 1e-6


def naive(x: Tensor, weight: Tensor, state: Tensor | None, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """silu(conv) for every token, and the inputs before the first padded one; x [B, S, Ch], in float64."""
    (B, S, Ch), W = x.shape, weight.shape[1]
    past = torch.zeros(B, Ch, W - 1) if state is None else state
    history = np.concatenate((past.double().numpy().swapaxes(1, 2), x.double().numpy()), axis=1)
    y = np.zeros((B, S, Ch))
    for b, t, w in np.ndindex(B, S, W):
        y[b, t] += weight[:, w].double().numpy() * history[b, t + w]
    new_state = np.stack([history[b, n : n + W - 1].T for b, n in enumerate(lengths)])
    return torch.from_numpy(y / (1 + np.exp(-y))), torch.from_numpy(new_state)


def mask(lengths: list[int], S: int) -> Tensor:
    return torch.arange(S) < torch.tensor(lengths)[:, None]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    Ch=st.integers(1, 9),
    W=st.integers(1, 5),
    with_state=st.booleans(),
)
def test_outputs_and_state_are_those_of_a_loop(
    lengths: list[int], padding: int, Ch: int, W: int, with_state: bool
) -> None:
    B, S = len(lengths), max(1, *lengths) + padding
    rng = torch.Generator().manual_seed(S)
    x, weight = torch.randn(B, S, Ch, generator=rng), torch.randn(Ch, W, generator=rng)
    state = torch.randn(B, Ch, W - 1, generator=rng) if with_state else None
    y, new_state = causal_conv(x, weight, state, mask(lengths, S))
    expected_y, expected_state = naive(x, weight, state, lengths)
    assert_close(y, expected_y, atol=TOLERANCE, rtol=TOLERANCE, label="y")
    assert_close(new_state.double(), expected_state, label="state")  # inputs are moved, not computed: to the bit
    if state is not None:
        assert_close(commit_conv(x, state, torch.tensor(lengths)).double(), expected_state, label="committed state")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_prompts_shorter_than_the_kernel_shift_the_state_by_their_length(length: int, dtype: torch.dtype) -> None:
    x, weight, state = torch.randn(1, 4, 6), torch.randn(6, 4), torch.randn(1, 6, 3)
    _, new_state = causal_conv(x, weight, state, mask([length], 4).to(dtype))
    assert_close(new_state, torch.cat((state, x[:, :length].transpose(1, 2)), dim=-1)[..., -3:])


@pytest.mark.parametrize("S", [1, 2, 3, 4, 9])
def test_no_mask_means_that_every_token_is_real(S: int) -> None:
    x, weight, state = torch.randn(2, S, 6), torch.randn(6, 4), torch.randn(2, 6, 3)
    for given_state in (state, None):
        actual = causal_conv(x, weight, given_state)
        for a, e in zip(actual, causal_conv(x, weight, given_state, mask([S, S], S)), strict=True):
            assert_close(a, e)


def test_padded_inputs_reach_neither_real_outputs_nor_the_state() -> None:
    x, weight, lengths = torch.randn(3, 8, 6), torch.randn(6, 4), [8, 5, 1]
    real = mask(lengths, 8)
    y, state = causal_conv(x, weight, None, real)
    poisoned = torch.where(real.unsqueeze(-1), x, torch.nan)
    poisoned_y, poisoned_state = causal_conv(poisoned, weight, None, real)
    assert_close(poisoned_y[real], y[real])
    assert_close(poisoned_state, state)


@pytest.mark.parametrize("pieces", [[1] * 12, [2, 10], [3, 1, 8], [7, 5], [11, 1]])
def test_pieces_with_carried_state_equal_one_piece(pieces: list[int]) -> None:
    x, weight = torch.randn(2, 12, 6), torch.randn(6, 4)
    state: Tensor | None = None
    outputs = []
    for part in x.split(pieces, dim=1):
        y, state = causal_conv(part, weight, state)
        outputs.append(y)
    assert state is not None
    whole_y, whole_state = causal_conv(x, weight)
    assert_close(torch.cat(outputs, dim=1), whole_y, atol=TOLERANCE, label="y")
    assert_close(state, whole_state, label="state")


# bfloat16 keeps 8 bits: sums that round to the other neighbour are 2^-8 apart, and the SiLU rounds once more.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 2.0**-7)])
def test_prefill_and_decode_are_those_of_transformers(dtype: torch.dtype, tolerance: float) -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    x, weight = torch.randn(2, 9, 32).to(dtype), torch.randn(32, 4).to(dtype)
    y, state = causal_conv(x, weight)
    assert y.dtype == state.dtype == dtype
    expected = theirs.causal_conv1d_fn(x.transpose(1, 2), weight, activation="silu").transpose(1, 2)
    assert_close(y, expected, atol=tolerance, rtol=tolerance, label="prefill")

    their_state = x.transpose(1, 2)[..., -3:].clone()
    assert_close(state, their_state, label="state after prefill")
    for step in range(3):
        token = torch.randn(2, 1, 32).to(dtype)
        y, state = causal_conv(token, weight, state)
        expected = theirs.causal_conv1d_update(token.transpose(1, 2), their_state, weight, activation="silu")
        assert_close(y, expected.transpose(1, 2), atol=tolerance, rtol=tolerance, label=f"decode step {step}")
        assert_close(state, their_state, label=f"state after decode step {step}")


def test_sums_in_bfloat16_are_rounded_once() -> None:
    x, weight = torch.randn(1, 50, 64).bfloat16(), torch.randn(64, 4).bfloat16()
    y, _ = causal_conv(x, weight)
    window = torch.nn.functional.pad(x.double(), (0, 0, 3, 0))
    exact = sum(window[:, w : w + 50] * weight[:, w].double() for w in range(4))
    assert isinstance(exact, Tensor)
    assert_close(y, torch.nn.functional.silu(exact.bfloat16()))


def test_the_state_is_a_small_copy_and_inputs_are_left_as_they_were() -> None:
    x, weight, state = torch.randn(1, 100, 6), torch.randn(6, 4), torch.randn(1, 6, 3)
    before = [t.clone() for t in (x, weight, state)]
    _, new_state = causal_conv(x, weight, state)
    assert new_state.is_contiguous() and new_state.untyped_storage().nbytes() == new_state.nbytes
    new_state.fill_(7.0)
    for now, then in zip((x, weight, state), before, strict=True):
        assert_close(now, then)


def test_the_traced_graph_holds_no_operator_that_the_neuron_compiler_refuses() -> None:
    x, weight, state, real = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(2, 6, 3), mask([9, 2], 9)
    graph = make_fx(torch.func.functionalize(causal_conv))(x, weight, state, real)
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    refused = ("scatter", "index_put", "scalar_dense", "nonzero", "masked_select")
    assert not [n for n in names if any(r in n for r in refused)], names
    other = mask([1, 0], 9)  # the graph follows lengths that it was not traced with
    for a, e in zip(graph(x, weight, state, other), causal_conv(x, weight, state, other), strict=True):
        assert_close(a, e)


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[5, 4\], expected \[6, W\]"):
        causal_conv(torch.zeros(1, 2, 6), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"state has shape \[1, 6, 4\], expected \[1, 6, 3\]"):
        causal_conv(torch.zeros(1, 2, 6), torch.zeros(6, 4), torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match=r"state has shape \[2, 6, 3\], expected \[1, 6, W - 1\]"):
        commit_conv(torch.zeros(1, 2, 6), torch.zeros(2, 6, 3), torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"accepted has shape \[2\], expected \[1\]"):
        commit_conv(torch.zeros(1, 2, 6), torch.zeros(1, 6, 3), torch.ones(2, dtype=torch.int64))
