# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Names of data types, and the rounding of values when they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nki_emulator import dtypes
from nki_emulator import isa as nisa
from support.onchip import BF16, run


def test_float_to_integer_rounds_to_even_and_saturates() -> None:
    x = np.float32([[0.5, 1.5, -2.5, 300.0, -5.0]])
    y = run(lambda dst, a: nisa.tensor_copy(dst, a), x, out=x.shape, dtype="uint8")
    assert y[0].tolist() == [0, 2, 0, 255, 0]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (BF16, "bfloat16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e5m2, "float8_e5m2"),
        (np.bool_, "bool"),
        ("tfloat32", "tfloat32"),
    ],
)
def test_types_of_numpy_torch_and_nki_have_one_name(given: Any, name: str) -> None:
    assert dtypes.canonical(given) == name


def test_a_type_without_equivalent_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"float64.* is no NKI data type; valid names: uint8, int8"):
        dtypes.canonical(np.float64)


@pytest.mark.parametrize(("value", "rounded"), [(1 + 2**-11, 1.0), (1 + 3 * 2**-11, 1 + 2**-9), (-np.inf, -np.inf)])
def test_tfloat32_rounds_ties_to_even(value: float, rounded: float) -> None:
    assert float(dtypes.round_tf32(np.float32([value]))[0]) == rounded
