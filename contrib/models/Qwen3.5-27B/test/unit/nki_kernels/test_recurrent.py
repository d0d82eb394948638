# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels that take one head token by token, in the emulator, against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.recurrent import deltanet_recurrent_fwd, deltanet_recurrent_fwd_state
from support.kernel_cases import assert_near

D = 128

# Relative to the largest element. float32 rounds at 6e-8 and some hundred products meet in a sum; bfloat16 operands are
# exact inside the kernel, so that only the output's own rounding, 2^-9 = 2e-3, is left.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
STATE_TOLERANCE = 1e-5  # float32 whatever the operands


def head_inputs(S: int, dtype: torch.dtype, g: float) -> list[Tensor]:
    q, k = (torch.nn.functional.normalize(torch.randn(S, D), dim=-1) for _ in range(2))
    log_decay, beta = (x.expand(S, D).contiguous() for x in (g * torch.rand(S, 1), torch.rand(S, 1)))
    return [*(x.to(dtype) for x in (q / D**0.5, k, torch.randn(S, D))), log_decay, beta]


def naive_head(inputs: list[Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.double() for x in inputs)
    S, outputs = S.double(), []
    for t in range(q.shape[0]):
        S = g[t, 0].exp() * S
        S = S + torch.outer(k[t], beta[t, 0] * (v[t] - S.T @ k[t]))
        outputs.append(S.T @ q[t])
    return torch.stack(outputs), S


@pytest.mark.parametrize("grid", [None, 2], ids=["one core", "two cores"])
@pytest.mark.parametrize("g", [-0.01, -3.0, -200.0])
@pytest.mark.parametrize(("S", "dtype"), [(1, torch.float32), (40, torch.float32), (40, torch.bfloat16)], ids=str)
def test_one_head_is_the_recurrence(S: int, dtype: torch.dtype, g: float, grid: int | None) -> None:
    inputs = head_inputs(S, dtype, g)
    initial = torch.randn(D, D)
    output, state = nki_emulator.emulate(deltanet_recurrent_fwd_state, *inputs, initial, grid=grid, timed=False).outputs
    expected, expected_state = naive_head(inputs, initial)
    assert output.dtype == dtype
    assert_near(output, expected, TOLERANCE[dtype], "output")
    assert_near(state, expected_state, STATE_TOLERANCE, "state")


def test_one_head_takes_more_tokens_than_partitions_and_gates_of_one_column() -> None:
    q, k, v, g, beta = head_inputs(150, torch.float32, -1.0)
    output = nki_emulator.emulate(
        deltanet_recurrent_fwd, q, k, v, g[:, :1].contiguous(), beta[:, :1].contiguous(), timed=False
    ).outputs
    expected, _ = naive_head([q, k, v, g, beta], torch.zeros(D, D))
    assert_near(output, expected, TOLERANCE[torch.float32], "output")


@pytest.mark.parametrize("kernel", [deltanet_recurrent_fwd, deltanet_recurrent_fwd_state])
def test_kernels_are_written_in_the_nki_language(kernel: Any) -> None:
    assert nki_emulator.lint_kernel(kernel) == []
