# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Vector engine against independent NumPy formulas, over types and edge shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, DTYPES, F32_SUM, SHAPES, assert_close, data, f64, run, store, tile

BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "power": np.power,
}


@pytest.mark.parametrize("name", BINARY)
def test_tensor_tensor_operators(name: str) -> None:
    x, y = (np.abs(data((32, 50))) + 0.1).round(1), data((32, 50), seed=1).round(1)
    result = run(lambda dst, a, b: nisa.tensor_tensor(dst, a, b, getattr(nl, name)), x, y, out=x.shape)
    assert_close(result, BINARY[name](f64(x), f64(y)), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_tensor_rounds_once(shape: tuple[int, int], dtype: Any) -> None:
    x, y = data(shape, dtype), data(shape, dtype, 1)
    result = run(
        lambda dst, a, b: nisa.tensor_tensor(dst, a, b, nl.multiply), x, y, out=shape, dtype=np.dtype(dtype).name
    )
    exact = (x.astype(np.float32) * y.astype(np.float32)).astype(dtype)
    assert result.tobytes() == exact.tobytes()


def test_int32_tiles_are_exact_on_gpsimd_and_rounded_on_vector() -> None:
    x = np.full((1, 1), 2**24 + 1, np.int32)
    one = np.ones((1, 1), np.int32)

    def add(engine: Any) -> int:
        y = run(
            lambda dst, a, b: nisa.tensor_tensor(dst, a, b, nl.add, engine=engine), x, one, out=(1, 1), dtype="int32"
        )
        return int(y[0, 0])

    assert add(nisa.engine.unknown) == 2**24 + 2
    assert add(nisa.engine.vector) == 2**24


@pytest.mark.parametrize("op", ["bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift"])
def test_bitvec_operators_treat_bits(op: str) -> None:
    x = np.arange(64, dtype=np.uint16).reshape(4, 16)
    y = (x % 5).astype(np.uint16)
    functions = {"left_shift": np.left_shift, "right_shift": np.right_shift}
    function = functions.get(op) or getattr(np, op)
    both = run(lambda dst, a, b: nisa.tensor_tensor(dst, a, b, getattr(nl, op)), x, y, out=x.shape, dtype="uint16")
    constant = run(lambda dst, a: nisa.tensor_scalar(dst, a, getattr(nl, op), 3), x, out=x.shape, dtype="uint16")
    np.testing.assert_array_equal(both, function(x, y))
    np.testing.assert_array_equal(constant, function(x, np.uint16(3)))


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
def test_tensor_scalar_chains_two_operators(reverse0: bool, reverse1: bool) -> None:
    x, column = data((128, 9)), data((128, 1), seed=1)
    y = run(
        lambda dst, a, c: nisa.tensor_scalar(dst, a, nl.subtract, c, reverse0, nl.subtract, 2.0, reverse1),
        x,
        column,
        out=x.shape,
    )
    first = f64(column) - f64(x) if reverse0 else f64(x) - f64(column)
    assert_close(y, 2.0 - first if reverse1 else first - 2.0, 1e-6)


@pytest.mark.parametrize("buffers", [(nl.sbuf, nl.psum), (nl.psum, nl.sbuf)])
def test_scalar_tensor_tensor(buffers: tuple[Any, Any]) -> None:
    x, y, column = data((64, 33)), data((64, 33), seed=1), data((64, 1), seed=2)
    result = run(
        lambda dst, a, b, c: nisa.scalar_tensor_tensor(dst, a, nl.multiply, c, nl.subtract, b, reverse1=True),
        x,
        y,
        column,
        out=x.shape,
        buffers=buffers,
    )
    assert_close(result, f64(y) - f64(x) * f64(column), 1e-6)


@pytest.mark.parametrize("axis", [3, (2, 3), (1, 2, 3), -1])
@pytest.mark.parametrize("op", ["add", "maximum", "minimum", "multiply"])
def test_tensor_reduce_over_the_last_axes(op: str, axis: Any) -> None:
    x = data((16, 3, 4, 5))
    axes = (axis,) if isinstance(axis, int) else axis
    function = {"add": np.sum, "maximum": np.max, "minimum": np.min, "multiply": np.prod}[op]
    expected = function(f64(x), axis=axes)
    y = run(
        lambda dst, a: nisa.tensor_reduce(dst, getattr(nl, op), a, axis, negate=True),
        x,
        out=expected.shape if expected.ndim > 1 else (16, 1),
    )
    assert_close(y.reshape(expected.shape), -expected, 1e-6)


def test_tensor_scalar_reduce_returns_values_and_their_reduction() -> None:
    x = data((128, 100))

    def kernel(a: Any) -> Any:
        dst, total = nl.ndarray((128, 100), nl.float32), nl.ndarray((128, 1), nl.float32)
        nisa.tensor_scalar_reduce(dst, tile(a), nl.add, 1.5, nl.max, total)
        return store(dst), store(total)

    values, total = emulate(kernel, x).outputs
    assert_close(values, f64(x) + 1.5, 1e-6)
    assert_close(total, (f64(x) + 1.5).max(1, keepdims=True), 1e-6)


def test_scan_carries_float32_along_the_free_axis() -> None:
    decay, x, initial = np.abs(data((32, 70))).clip(0, 1), data((32, 70), seed=1), data((32, 1), seed=2)
    y = run(
        lambda dst, a, b, c: nisa.tensor_tensor_scan(dst, a, b, c, nl.multiply, nl.add),
        decay,
        x,
        initial,
        out=x.shape,
    )
    expected, state = np.zeros((32, 70)), f64(initial)[:, 0]
    for i in range(70):
        state = f64(decay)[:, i] * state + f64(x)[:, i]
        expected[:, i] = state
    assert_close(y, expected, 1e-6)


def test_cumulative_scan_continues_from_its_registers() -> None:
    x = data((8, 20))

    def kernel(a: Any) -> Any:
        t, first, second = tile(a), nl.ndarray((8, 20), nl.float32), nl.ndarray((8, 20), nl.float32)
        nisa.tensor_scalar_cumulative(first, t, nl.multiply, nl.add, 2.0)
        nisa.tensor_scalar_cumulative(second, t, nl.multiply, nl.add, 2.0, reduce_cmd=nisa.reduce_cmd.reduce)
        return store(first), store(second)

    first, second = emulate(kernel, x).outputs
    both = np.cumsum(2 * np.concatenate([f64(x), f64(x)], axis=1), axis=1)
    assert_close(np.concatenate([first, second], axis=1), both, 1e-6)


def test_bn_stats_and_aggr_give_mean_and_variance() -> None:
    x = data((128, 700)) + 3

    def kernel(a: Any) -> Any:
        t, stats, out = tile(a), nl.ndarray((128, 2, 6), nl.float32), nl.ndarray((128, 2), nl.float32)
        nisa.bn_stats(stats[:, 0, :], t[:, 0:512])
        nisa.bn_stats(stats[:, 1, :], t[:, 512:700])
        nisa.bn_aggr(out, stats)
        return store(out)

    y = emulate(kernel, x).outputs
    assert_close(y, np.stack([f64(x).mean(1), f64(x).var(1)], axis=1), F32_SUM)


def test_reciprocal_and_memset() -> None:
    x = data((5, 6))
    assert_close(run(lambda dst, a: nisa.reciprocal(dst, a), x, out=x.shape), 1 / f64(x), 1e-6)
    assert (run(lambda dst: nisa.memset(dst, 7), out=(3, 4), dtype="int8") == 7).all()
    assert (run(lambda dst: nisa.memset(dst, -0.5), out=(3, 4), dtype="bfloat16") == -0.5).all()


@pytest.mark.parametrize("engine", ["vector", "scalar", "gpsimd", "unknown"])
def test_tensor_copy_converts_through_float32(engine: str) -> None:
    x = data((64, 30))
    y = run(
        lambda dst, a: nisa.tensor_copy(dst, a, engine=getattr(nisa.engine, engine)),
        x,
        out=x.shape,
        dtype="bfloat16",
    )
    assert y.tobytes() == x.astype(BF16).tobytes()


@pytest.mark.parametrize("reverse", [False, True])
def test_predicated_copy_leaves_the_rest(reverse: bool) -> None:
    x, mask = data((16, 8)), (data((16, 8), seed=1) > 0).astype(np.uint8)

    def call(dst: Any, a: Any, m: Any) -> None:
        nisa.memset(dst, -1.0)
        nisa.tensor_copy_predicated(dst, a, m, reverse_pred=reverse)

    y = run(call, x, mask, out=x.shape)
    np.testing.assert_array_equal(y, np.where((mask != 0) != reverse, x, -1))


def test_select_reduce_keeps_the_row_maximum() -> None:
    x, mask = data((16, 8)), (data((16, 8), seed=1) > 0).astype(np.uint8)

    def kernel(a: Any, m: Any) -> Any:
        dst, top = nl.ndarray((16, 8), nl.float32), nl.ndarray((16, 1), nl.float32)
        nisa.select_reduce(dst, tile(m), tile(a), -9.0, top, nisa.reduce_cmd.reset_reduce)
        return store(dst), store(top)

    values, top = emulate(kernel, x, mask).outputs
    expected = np.where(mask != 0, x, -9)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(top, expected.max(1, keepdims=True))


def test_range_select_masks_by_index() -> None:
    x, low, high = data((4, 10)), np.float32([[0], [2], [5], [12]]), np.float32([[4], [12], [6], [13]])

    def kernel(a: Any, b: Any, c: Any) -> Any:
        dst, top = nl.ndarray((4, 10), nl.float32), nl.ndarray((4, 1), nl.float32)
        nisa.range_select(dst, tile(a), nl.greater_equal, nl.less, tile(b), tile(c), reduce_res=top, range_start=2)
        return store(dst), store(top)

    values, top = emulate(kernel, x, low, high).outputs
    index = 2 + np.arange(10)
    expected = np.where((index >= low) & (index < high), x, np.float32(-3.4028235e38))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(top, expected.max(1, keepdims=True))


def test_stream_shuffle_permutes_within_groups_of_32() -> None:
    x = data((64, 5))
    mask = [*range(31, 0, -1), 255]
    y = run(
        lambda dst, a: (nisa.memset(dst, 0.0), nisa.nc_stream_shuffle(dst, a, mask)),  # type: ignore[func-returns-value]
        x,
        out=x.shape,
    )
    expected = np.zeros_like(x)
    for group in (0, 32):
        for i, source in enumerate(mask):
            if source != 255:
                expected[group + i] = x[group + source]
    np.testing.assert_array_equal(y, expected)


def test_stream_shuffle_broadcasts_one_row() -> None:
    x = data((32, 5))
    y = run(lambda dst, a: nisa.nc_stream_shuffle(dst, a, [7] * 32), x, out=x.shape)
    np.testing.assert_array_equal(y, np.repeat(x[7:8], 32, axis=0))


def test_top_eight_and_their_places() -> None:
    x = np.random.default_rng(0).permutation(16 * 40).reshape(16, 40).astype(np.float32)

    def kernel(a: Any) -> Any:
        t, top, where = tile(a), nl.ndarray((16, 8), nl.float32), nl.ndarray((16, 8), nl.uint32)
        rest, again = nl.ndarray((16, 40), nl.float32), nl.ndarray((16, 8), nl.uint16)
        nisa.max8(top, t)
        nisa.nc_find_index8(where, t, top)
        nisa.nc_match_replace8(rest, t, top, -1.0, dst_idx=again)
        return store(top), store(where), store(rest), store(again)

    top, where, rest, again = emulate(kernel, x).outputs
    order = np.argsort(-x, axis=1)[:, :8]
    np.testing.assert_array_equal(top, np.take_along_axis(x, order, 1))
    np.testing.assert_array_equal(where, order)
    np.testing.assert_array_equal(again, order)
    expected = x.copy()
    np.put_along_axis(expected, order, -1, 1)
    np.testing.assert_array_equal(rest, expected)


def test_equal_values_are_found_at_successive_places() -> None:
    x = np.zeros((1, 8), np.float32)
    y = run(lambda dst, a: nisa.nc_find_index8(dst, a, a), x, out=(1, 8), dtype="uint32")
    assert y[0].tolist() == list(range(8))
