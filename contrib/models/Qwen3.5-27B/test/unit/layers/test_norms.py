# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The RMS norms, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from qwen35.layers.norms import Qwen35GatedRMSNorm, Qwen35RMSNorm
from support.compare import assert_close

transformers = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

SIZE, EPS = 24, 1e-6
# Two roundings of values of order one in float32; one rounding to bfloat16 that may fall to either side.
TOLERANCE = {torch.float32: dict(atol=1e-6, rtol=1e-6), torch.bfloat16: dict(atol=1e-6, rtol=2.0**-7)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_a_norm_equals_transformers_with_one_added_to_its_weight(dtype: torch.dtype, scale: float) -> None:
    theirs, ours = transformers.Qwen3_5RMSNorm(SIZE, EPS), Qwen35RMSNorm(SIZE, EPS)
    theirs.weight.data = 0.3 * torch.randn(SIZE)
    ours.weight.data = 1 + theirs.weight.data  # as the conversion folds it
    x = (scale * torch.randn(2, 5, SIZE)).to(dtype)
    with torch.no_grad():
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == dtype
    assert_close(actual, expected, label="normed", **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gated_norm_equals_transformers(dtype: torch.dtype) -> None:
    theirs, ours = transformers.Qwen3_5RMSNormGated(SIZE, EPS), Qwen35GatedRMSNorm(SIZE, EPS)
    ours.weight.data = theirs.weight.data = 1 + 0.3 * torch.randn(SIZE)
    x, gate = torch.randn(2, 3, 5, SIZE).to(dtype)
    with torch.no_grad():
        actual, expected = ours(x, gate), theirs(x, gate)
    assert actual.dtype == dtype
    # transformers rounds to bfloat16 before it multiplies by the gate too.
    assert_close(actual, expected, label="normed and gated", **TOLERANCE[dtype])
