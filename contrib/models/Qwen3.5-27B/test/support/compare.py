# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Comparison of tensors that shows the worst element when it fails."""

from __future__ import annotations

import torch


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, atol: float = 0.0, rtol: float = 0.0, label: str = "tensor"
) -> None:
    """`|actual - expected| <= atol + rtol * |expected|` everywhere, NaN nowhere, same shape; 0 and 0 mean bit-exact."""
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0 or (actual.dtype == expected.dtype and torch.equal(actual, expected)):
        return
    a, e = actual.detach().double(), expected.detach().double()
    excess = ((a - e).abs() - (atol + rtol * e.abs())).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape))
        raise AssertionError(
            f"{label}: {int((excess > 0).sum())} of {excess.numel()} elements are off by more than "
            f"atol={atol:g} rtol={rtol:g}; worst at {index}: {a[index].item()!r}, expected {e[index].item()!r}"
        )
