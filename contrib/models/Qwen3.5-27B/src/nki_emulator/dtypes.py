# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""NKI data types: their names, how NumPy stores them, and the cast on write.

NKI names a data type by a string (``nl.bfloat16 == "bfloat16"``). Low-precision floats are stored as real ``ml_dtypes``
values, so a value is rounded exactly where the hardware rounds it: when an instruction writes its destination.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

#: NKI name -> NumPy storage type. ``tfloat32`` is stored as float32 whose mantissa keeps ten bits.
STORAGE: dict[str, np.dtype] = {
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "uint16": np.dtype(np.uint16),
    "int16": np.dtype(np.int16),
    "uint32": np.dtype(np.uint32),
    "int32": np.dtype(np.int32),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tfloat32": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
    "bool": np.dtype(np.bool_),
    # Packed types of NeuronCore-v4: carried as opaque words, never computed with.
    "float8_e4m3fn_x4": np.dtype(np.uint32),
    "float8_e5m2_x4": np.dtype(np.uint32),
    "float4_e2m1fn_x4": np.dtype(np.uint16),
}

INTEGERS = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32"})
FLOATS = frozenset({"float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "tfloat32", "float32"})
FP8 = frozenset({"float8_e4m3", "float8_e4m3fn", "float8_e5m2"})
HALVES = frozenset({"bfloat16", "float16"})
FP32S = frozenset({"float32", "tfloat32"})
PACKED_X4 = frozenset({"float8_e4m3fn_x4", "float8_e5m2_x4", "float4_e2m1fn_x4"})

#: Value of integer memory that nobody wrote, as in the official simulator (nki/guides/nki_simulator.rst).
UNINITIALISED_INT = 4


def canonical(dtype: Any) -> str:
    """The NKI name of ``dtype``, given by NKI name, NumPy dtype or torch dtype.

    Raises:
        ValueError: the type has no NKI equivalent (e.g. float64).
    """
    if isinstance(dtype, str) and dtype in STORAGE:
        return dtype
    text = str(dtype)
    name = text.rsplit(".", 1)[-1].rstrip("'>") if text.startswith(("torch.", "<class")) else np.dtype(dtype).name
    name = {"float8_e4m3fnuz": "float8_e4m3fn", "bool_": "bool"}.get(name, name)
    if name not in STORAGE:
        raise ValueError(f"dtype={dtype!r} is no NKI data type; valid names: {', '.join(STORAGE)}")
    return name


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return STORAGE[dtype].itemsize


def sentinel(dtype: str) -> float | int:
    """What memory of this type holds before the first write: NaN for floats, 4 for integers."""
    return float("nan") if dtype in FLOATS else UNINITIALISED_INT if dtype in INTEGERS else 0


def round_tf32(values: np.ndarray) -> np.ndarray:
    """Round float32 to the ten mantissa bits of tfloat32, ties to even; NaN and infinity pass."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(
        np.float32
    )
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def to_float32(values: np.ndarray) -> np.ndarray:
    """Operand as an engine sees it: float32, whatever it is stored as."""
    return values if values.dtype == np.float32 else values.astype(np.float32)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast engine results to the storage of ``dtype``: nearest even for floats; nearest, saturating for integers.

    Integer rounding and saturation are inferred: the documentation gives no mode for float to integer.
    """
    target = STORAGE[dtype]
    if dtype == "tfloat32":
        return round_tf32(values.astype(np.float32))
    if values.dtype == target:
        return values
    if dtype in INTEGERS:
        info = np.iinfo(target)
        if np.issubdtype(values.dtype, np.integer):
            return np.clip(values.astype(np.int64), info.min, info.max).astype(target)
        wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=info.max, neginf=info.min)
        return np.clip(np.rint(wide), info.min, info.max).astype(target)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "float32" and np.issubdtype(values.dtype, np.integer):
            values = values.astype(np.float32)
        return values.astype(target)


def promote(left: str, right: str) -> str:
    """Result type of the ``nl`` convenience functions on two tiles: the more precise of the two."""
    if left == right:
        return left
    order = ("float32", "tfloat32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3", "float8_e4m3fn")
    for name in order:
        if name in (left, right):
            # Neither half type holds the other's values.
            return "float32" if {left, right} == {"bfloat16", "float16"} else name
    return left if itemsize(left) >= itemsize(right) else right
