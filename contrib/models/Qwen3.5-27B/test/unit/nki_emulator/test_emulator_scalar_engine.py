# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Scalar engine against independent NumPy formulas, over types and edge shapes."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16_ONCE, DTYPES, F32_SUM, SHAPES, assert_close, data, f64, run, store, tile


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "copy": lambda x: x,
    "square": lambda x: x * x,
    "sigmoid": sigmoid,
    "relu": lambda x: np.where(x > 0, x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "gelu_apprx_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "erf": np.vectorize(erf),
    "erf_dx": lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2)),
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x**-0.5,
    "reciprocal": lambda x: 1 / x,
    "sign": np.sign,
    "abs": np.abs,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name: str) -> None:
    x = data((128, 64)).clip(-1.5, 1.5)
    if name in ("log", "sqrt", "rsqrt", "reciprocal"):
        x = np.abs(x) + 0.1
    y = run(lambda dst, a: nisa.activation(dst, getattr(nl, name), a), x, out=x.shape)
    assert_close(y, ACTIVATIONS[name](f64(x)), 1e-6)


@pytest.mark.parametrize("name", ["gelu_dx", "gelu_apprx_sigmoid_dx"])
def test_derivative_activations_are_derivatives(name: str) -> None:
    x = data((8, 64))
    base = ACTIVATIONS[{"gelu_dx": "gelu", "gelu_apprx_sigmoid_dx": "gelu_apprx_sigmoid"}[name]]
    slope = (base(f64(x) + 1e-5) - base(f64(x) - 1e-5)) / 2e-5
    y = run(lambda dst, a: nisa.activation(dst, getattr(nl, name), a), x, out=x.shape)
    assert_close(y, slope, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_scales_then_adds_bias_then_rounds(shape: tuple[int, int], dtype: Any) -> None:
    x, scale, bias = data(shape, dtype), data((shape[0], 1)), data((shape[0], 1), seed=2)
    y = run(
        lambda dst, a, s, b: nisa.activation(dst, nl.exp, a, bias=b, scale=s),
        x,
        scale,
        bias,
        out=shape,
        dtype=np.dtype(dtype).name,
    )
    assert y.dtype == np.dtype(dtype)
    assert_close(y, np.exp(f64(x) * f64(scale) + f64(bias)), BF16_ONCE)


def test_activation_keeps_sums_in_registers_across_calls() -> None:
    x = data((16, 40))

    def kernel(a: Any) -> Any:
        t, dst, total = tile(a), nl.ndarray((16, 40), nl.float32), nl.ndarray((16, 1), nl.float32)
        for cmd, res in ((nisa.reduce_cmd.reset_reduce, None), (nisa.reduce_cmd.reduce, total)):
            nisa.activation(dst, nl.square, t, reduce_op=nl.add, reduce_res=res, reduce_cmd=cmd)
        once = nl.ndarray((16, 1), nl.float32)
        nisa.activation_reduce(dst, nl.square, t, nl.add, once)
        return store(total), store(once)

    twice, once = emulate(kernel, x).outputs
    expected = (f64(x) ** 2).sum(1, keepdims=True)
    assert_close(twice, 2 * expected, F32_SUM)
    assert_close(once, expected, F32_SUM)


def test_reduce_registers_without_a_reset_show_as_nan() -> None:
    def kernel(a: Any) -> Any:
        total = nl.ndarray((4, 1), nl.float32)
        nisa.activation(
            nl.ndarray((4, 4), nl.float32), nl.exp, tile(a), None, 1.0, nl.add, total, nisa.reduce_cmd.reduce
        )
        return store(total)

    assert np.isnan(emulate(kernel, data((4, 4))).outputs).all()
