# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Operators that instructions take as ``op=``: what each computes, and where it is legal.

The tables follow nki/api/nki.api.shared.rst (supported math operators, supported activation functions). An operator is
named by the ``nki.language`` function that also serves as a convenience call: ``nl.add``, ``nl.exp``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np

from .errors import fail

_OPS_DOC = "nki/api/nki.api.shared.rst, Supported Math Operators"
_ACT_DOC = "nki/api/nki.api.shared.rst, Supported Activation Functions"

Binary = Callable[[Any, Any], np.ndarray]
Unary = Callable[[np.ndarray], np.ndarray]


def _erf(x: np.ndarray) -> np.ndarray:
    import torch  # NumPy has no erf

    return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # Half a tanh: exact limits on both sides without overflow.
    return 0.5 * np.tanh(0.5 * x) + 0.5


def _gelu_dx(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + _erf(x * np.sqrt(0.5))) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gelu_sigmoid_dx(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1 - s)


def _silu_dx(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, np.float32(0))


#: Arithmetic operators of the Vector engine; all computed in float32.
ARITHMETIC: dict[str, Binary] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "max": np.maximum,
    "min": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater_equal": np.greater_equal,
    "greater": np.greater,
    "less_equal": np.less_equal,
    "less": np.less,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    # Unary in effect: the second operand is not used.
    "rsqrt": lambda x, _: 1.0 / np.sqrt(x),
    "reciprocal": lambda x, _: 1.0 / x,
    "abs": lambda x, _: np.abs(x),
    "power": np.power,
}

#: Operators of the ``nl`` convenience functions that no single instruction provides.
COMPOSED: dict[str, Binary] = {"divide": np.divide, "mod": np.mod, "fmod": np.fmod}

BITVEC: dict[str, Binary] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
    "invert": lambda x, _: np.invert(x),
}

COMPARISONS = frozenset({"equal", "not_equal", "greater", "greater_equal", "less", "less_equal"})

#: Operators that may reduce, with the value that leaves a reduction unchanged.
REDUCTIONS: dict[str, float] = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -np.inf,
    "max": -np.inf,
    "minimum": np.inf,
    "min": np.inf,
    "logical_and": 1.0,
    "logical_or": 0.0,
    "logical_xor": 0.0,
}

ACTIVATIONS: dict[str, Unary] = {
    "copy": lambda x: x,
    "square": np.square,
    "sigmoid": _sigmoid,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * np.float32(np.sqrt(0.5)))),
    "gelu_dx": _gelu_dx,
    "gelu_apprx_tanh": _gelu_tanh,
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": _gelu_sigmoid_dx,
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": _silu_dx,
    "tanh": np.tanh,
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "erf": _erf,
    "erf_dx": lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x),
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "reciprocal": lambda x: 1.0 / x,
    "sign": np.sign,
    "abs": np.abs,
}

#: Input ranges outside which the Scalar engine's table gives invalid results.
VALID_RANGE: dict[str, tuple[float, float]] = {
    "log": (2.0**-64, 2.0**64),
    "sin": (-pi, pi),
    "arctan": (-pi / 2, pi / 2),
    "sqrt": (2.0**-116, 2.0**118),
    "rsqrt": (2.0**-87, 2.0**97),
}


@dataclass(frozen=True)
class Operator:
    """An operator by its name alone, the default of an instruction that takes one.

    The ``nki.language`` function of that name carries the same ``nki_operator``; being a convenience call too, it is
    built on the instructions, which therefore cannot name it.
    """

    nki_operator: str


EQUAL = Operator("equal")
MAXIMUM = Operator("maximum")


def op_name(call: str, operand: str, op: Any) -> str:
    """Name of the ``nki.language`` operator ``op``.

    Raises:
        NkiValidationError: ``op`` is something else, such as a NumPy function or a string.
    """
    name = getattr(op, "nki_operator", None)
    if name is None:
        fail(call, f"{operand}={op!r}", "an operator is a nki.language function such as nl.add", _OPS_DOC)
    return str(name)


def arithmetic(call: str, operand: str, op: Any) -> tuple[str, Binary]:
    """Name and function of an arithmetic operator."""
    name = op_name(call, operand, op)
    if name not in ARITHMETIC:
        hint = "; use nl.reciprocal and nl.multiply" if name == "divide" else ""
        fail(call, f"{operand}=nl.{name}", f"arithmetic operators are {', '.join(ARITHMETIC)}{hint}", _OPS_DOC)
    return name, ARITHMETIC[name]


def activation(call: str, op: Any) -> tuple[str, Unary]:
    """Name and function of an activation function."""
    name = op_name(call, "op", op)
    if name not in ACTIVATIONS:
        fail(call, f"op=nl.{name}", f"activation functions are {', '.join(ACTIVATIONS)}", _ACT_DOC)
    return name, ACTIVATIONS[name]


def check_range(call: str, name: str, values: np.ndarray) -> None:
    """Reject inputs outside the valid range of an activation function; NaN passes, it shows elsewhere."""
    if name not in VALID_RANGE:
        return
    low, high = VALID_RANGE[name]
    # The table bounds are rounded the way kernels write them: float32(pi) is a legal argument of sin.
    bad = (values < np.float32(low)) | (values > np.float32(high))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        fail(call, f"nl.{name} of {values[where]:g} at {where}", f"valid inputs are {low:g} to {high:g}", _ACT_DOC)


def reduce_free(name: str, values: np.ndarray) -> np.ndarray:
    """Reduce ``[P, F]`` float32 along the free axis to ``[P, 1]``."""
    if name in ("add", "multiply"):
        return ARITHMETIC[name].reduce(values, axis=1, keepdims=True, dtype=np.float32)  # type: ignore[attr-defined]
    if name == "subtract":
        return np.negative(values.sum(axis=1, keepdims=True, dtype=np.float32))
    return ARITHMETIC[name].reduce(values, axis=1, keepdims=True).astype(np.float32)  # type: ignore[attr-defined]
