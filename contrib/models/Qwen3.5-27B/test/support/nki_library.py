# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""nki-library for the tests that run its kernels: installed, or a checkout that NKI_LIBRARY names (docs/testing.md)."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qwen35.nxdi import NXDI_AVAILABLE

CHECKOUT = os.environ.get("NKI_LIBRARY")
os.environ.setdefault("NKILIB_LOG_LEVEL", "WARN")  # else every launch prints what it allocates
if CHECKOUT:
    sources = Path(CHECKOUT) / "src" / "nkilib_src"
    assert (sources / "nkilib").is_dir(), f"NKI_LIBRARY={CHECKOUT} has no src/nkilib_src/nkilib: give a checkout"
    sys.path.insert(0, str(sources))

needs_library = pytest.mark.skipif(
    NXDI_AVAILABLE or find_spec("nkilib") is None,
    reason="NKI_LIBRARY names no checkout of nki-library, or an empty module stands for it beside NxDI's sources",
)


def mlp_matrices(hidden: int, columns: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """gate, up [hidden, columns] and down [columns, hidden] with columns of very different sizes, in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for inputs, outputs in ((hidden, columns), (hidden, columns), (columns, hidden)):
        sizes = torch.exp(torch.randn(outputs, generator=generator)) / inputs**0.5
        matrices.append((torch.randn(inputs, outputs, generator=generator) * sizes).to(dtype))
    return matrices


def in_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in float8_e4m3fn with the largest of each column at 240, and the scales [128, columns] float32."""
    scale = matrix.float().abs().amax(0) / 240
    return (matrix.float() / scale).to(torch.float8_e4m3fn), scale.repeat(128, 1)


def exact_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) in float64."""
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    inner = x @ gate
    return (inner * torch.sigmoid(inner) * (x @ up)) @ down
