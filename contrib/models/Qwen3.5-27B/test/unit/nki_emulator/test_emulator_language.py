# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Convenience calls on tiles against NumPy formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nki_emulator import emulate
from nki_emulator import language as nl
from support.onchip import assert_close

CONVENIENCE = {
    "add": (lambda x, y: nl.add(x, y), lambda x, y: x + y),
    "constant on the left": (lambda x, y: nl.subtract(1.0, x), lambda x, y: 1 - x),
    "divide": (lambda x, y: nl.divide(x, y), lambda x, y: x / y),
    "mod": (lambda x, y: nl.mod(x, 0.7), lambda x, y: np.mod(x, np.float32(0.7))),
    "power": (lambda x, y: nl.power(x, 2.0), lambda x, y: x**2),
    "where": (lambda x, y: nl.where(nl.greater(x, y), x, 0.0), lambda x, y: np.where(x > y, x, 0)),
    "mean": (lambda x, y: nl.mean(x, axis=1, keepdims=True), lambda x, y: x.mean(1, keepdims=True)),
    "var": (lambda x, y: nl.var(x, axis=1, keepdims=True), lambda x, y: x.var(1, keepdims=True)),
    "min": (lambda x, y: nl.min(x, axis=1, keepdims=True), lambda x, y: x.min(1, keepdims=True)),
    "softmax": (lambda x, y: nl.softmax(x), lambda x, y: torch.softmax(torch.from_numpy(x), 1).numpy()),
    "floor": (lambda x, y: nl.floor(x), lambda x, y: np.floor(x)),
    "matmul": (lambda x, y: nl.add(nl.matmul(x, y, transpose_x=True), 0.0), lambda x, y: x.T @ y),
    "matmul plain": (lambda x, y: nl.add(nl.matmul(x, y), 0.0), lambda x, y: x @ y),
    "full": (lambda x, y: nl.add(x, nl.full((40, 40), 3.0, nl.float32)), lambda x, y: x + 3),
    "identity": (lambda x, y: nl.add(x, nl.shared_identity_matrix(40, nl.float32)), lambda x, y: x + np.eye(40)),
    "rms_norm": (
        lambda x, y: nl.rms_norm(x, y, axis=1, n=40),
        lambda x, y: x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * y,
    ),
}


@pytest.mark.parametrize("name", CONVENIENCE)
def test_convenience_calls(name: str) -> None:
    call, formula = CONVENIENCE[name]
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((40, 40)).astype(np.float32) for _ in range(2))

    def kernel(a: Any, b: Any) -> Any:
        value = call(nl.load(a), nl.load(b))
        out = nl.ndarray(value.shape, value.dtype, buffer=nl.shared_hbm)
        nl.store(out, value)
        return out

    assert_close(emulate(kernel, x, y).outputs, formula(x, y), 1e-5)
