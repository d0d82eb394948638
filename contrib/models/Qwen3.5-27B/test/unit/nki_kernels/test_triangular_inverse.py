# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The inverse of a chunk's triangular system in the emulator, against numpy.linalg in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nki_emulator
from qwen35.nki_kernels.chunk_pieces import BLOCK, PLAIN, TILED, Shape, Unit, Work, make_constants
from qwen35.nki_kernels.chunked import FIRST_INVERSE_STAGE, PREPARE_STAGES, prepare
from qwen35.nki_kernels.nki_seam import EMULATED, nisa, nl

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")


def invert(transposed: Any, inverse: str) -> Any:
    """(I - A)^-T of A^T: [C, R, C] float32, by the stages in their order."""
    C, R, _ = transposed.shape
    shape = Shape(C=C, K=C, V=C, heads=R, key_heads=1, h0=0, k0=0, dtype=nl.float32, inverse=inverse)
    work = Work(unit=Unit(key=0, first=0, R=R), segment=None, chunk=0)
    work.A = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    work.T = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=work.A, src=transposed)
    work.halves = nl.ndarray((C, R, 2, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=work.T, value=0.0)
    nisa.memset(dst=work.halves, value=0.0)
    constants = make_constants(shape)
    for stage in range(FIRST_INVERSE_STAGE, PREPARE_STAGES):
        prepare(shape, constants, work, stage)
    out = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=work.T)
    return out


@pytest.mark.parametrize("kind", ["random", "equal keys"])
@pytest.mark.parametrize("R", [1, 3, 4])
@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize("inverse", [TILED, PLAIN])
def test_it_inverts_a_chunk_s_system(inverse: str, C: int, R: int, kind: str) -> None:
    if kind == "random":
        keys = np.random.default_rng(0).standard_normal((R, C, 128)) / np.sqrt(128)
        A = -np.tril(keys @ keys.transpose(0, 2, 1), -1)
    else:  # beta = 1, no decay: powers of A reach 1e37 at C = 128, the inverse has ones and minus ones
        A = -np.tril(np.ones((R, C, C)), -1)
    out = nki_emulator.emulate(invert, A.transpose(2, 0, 1).astype(np.float32), inverse, timed=False).outputs
    expected = np.linalg.inv(np.eye(C) - A.astype(np.float32).astype(np.float64))
    error = np.abs(out.transpose(1, 2, 0) - expected)
    worst = np.unravel_index(error.argmax(), error.shape)
    # float32 rounds at 6e-8; seven levels of products of up to 64 terms.
    assert error[worst] <= 1e-5 * np.abs(expected).max(), (
        f"at {worst}: off by {error[worst]:g} from {expected[worst]:g}"
    )
