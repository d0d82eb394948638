# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Each instruction against an independent NumPy formula, over types and edge shapes."""

from __future__ import annotations

from math import erf
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, assert_close, run, store, tile

F32_EXACT = 0.0
#: One rounding to bf16 has relative error 2**-9; two operations in float32 before it add nothing visible.
BF16_ONCE = 2.0**-8
#: Sums of a few hundred float32 terms in another order.
F32_SUM = 1e-5

SHAPES = [(128, 512), (1, 1), (128, 1), (33, 7), (64, 130)]
DTYPES = [np.float32, BF16, np.float16]


def data(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def f64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


# --- Tensor engine ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize(("k", "m", "n"), [(128, 128, 512), (1, 128, 4), (96, 1, 1), (17, 33, 65)])
def test_matmul_contracts_over_partitions(k: int, m: int, n: int, dtype: Any) -> None:
    w, x = data((k, m), dtype), data((k, n), dtype, 1)
    y = run(lambda dst, a, b: nisa.nc_matmul(dst, a, b), w, x, out=(m, n), out_buffer=nl.psum)
    assert_close(y, f64(w).T @ f64(x), F32_SUM)


def test_matmul_of_tfloat32_rounds_its_operands_to_ten_bits() -> None:
    x = np.full((1, 1), 1.0 + 2.0**-11 + 2.0**-13, np.float32)  # rounds up to 1 + 2**-10

    def kernel(a: Any) -> Any:
        t = nl.ndarray((1, 1), nl.tfloat32)
        nisa.tensor_copy(dst=t, src=tile(a))
        p = nl.ndarray((1, 1), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=p, stationary=t, moving=t)
        return store(p)

    assert float(emulate(kernel, x).outputs[0, 0]) == (1.0 + 2.0**-10) ** 2


def test_double_row_matmul_contracts_256() -> None:
    w, x = data((128, 2, 32), ml_dtypes.float8_e4m3), data((128, 2, 48), ml_dtypes.float8_e5m2, 1)
    y = run(
        lambda dst, a, b: nisa.nc_matmul(dst, a, b, perf_mode=nisa.matmul_perf_mode.double_row),
        w,
        x,
        out=(32, 48),
        out_buffer=nl.psum,
    )
    assert_close(y, np.einsum("ktm,ktn->mn", f64(w), f64(x)), F32_SUM)


@pytest.mark.parametrize(("accumulate", "expected"), [(None, 3.0), (True, 3.0), (False, 1.0)])
def test_accumulate_adds_or_overwrites(accumulate: bool | None, expected: float) -> None:
    def call(dst: Any, a: Any) -> None:
        nisa.nc_matmul(dst, a, a, accumulate=False)
        nisa.nc_matmul(dst, a, a, accumulate=accumulate)
        nisa.nc_matmul(dst, a, a, accumulate=accumulate)

    y = run(call, np.ones((1, 1), np.float32), out=(1, 1), out_buffer=nl.psum)
    assert float(y[0, 0]) == expected


def test_accumulate_none_overwrites_only_what_was_never_written() -> None:
    def call(dst: Any, a: Any) -> None:
        nisa.nc_matmul(dst[:, 0:2], a, a[:, 0:2])
        nisa.nc_matmul(dst, a, a)

    y = run(call, np.ones((1, 4), np.float32), out=(4, 4), out_buffer=nl.psum)
    assert y[0].tolist() == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8])
@pytest.mark.parametrize(("p", "f", "buffer"), [(128, 128, nl.psum), (3, 100, nl.psum), (32, 32, nl.sbuf)])
def test_transpose_is_exact(p: int, f: int, buffer: Any, dtype: Any) -> None:
    x = (100 * data((p, f))).astype(dtype)
    y = run(lambda dst, a: nisa.nc_transpose(dst, a), x, out=(f, p), dtype=str(x.dtype), out_buffer=buffer)
    assert y.tobytes() == np.ascontiguousarray(x.T).tobytes()


def test_transpose_mode_of_matmul_passes_nan_and_selects_rows() -> None:
    x = data((4, 6), BF16)
    x[1, 2] = np.nan
    permutation = np.eye(4, dtype=np.float32)[[2, 0, 3, 1]].astype(BF16)
    y = run(
        lambda dst, a, p: nisa.nc_matmul(dst, a, p, is_transpose=True),
        x,
        permutation,
        out=(6, 4),
        dtype="bfloat16",
        out_buffer=nl.psum,
    )
    expected = np.zeros((6, 4), np.float32)
    for column in range(4):
        expected[:, column] = x[permutation[:, column].astype(np.float32).argmax()].astype(np.float32)
    np.testing.assert_array_equal(y.astype(np.float32), expected)


def test_sub_array_tiles_compute_the_same_product() -> None:
    w, x = data((32, 64), BF16), data((32, 100), BF16, 1)
    y = run(
        lambda dst, a, b: nisa.nc_matmul(dst, a, b, tile_position=(32, 64), tile_size=(32, 64)),
        w,
        x,
        out=(64, 100),
        out_buffer=nl.psum,
    )
    assert_close(y, f64(w).T @ f64(x), F32_SUM)


# --- Scalar engine ---------------------------------------------------------------------------------------------------
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


# --- Vector engine ---------------------------------------------------------------------------------------------------
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


# --- GpSimd engine ---------------------------------------------------------------------------------------------------
def test_iota_counts_in_a_pattern() -> None:
    y = run(lambda dst: nisa.iota(dst, [[10, 3], [1, 4]], 100, 1000), out=(5, 12), dtype="int32")
    p, w, x = np.ogrid[0:5, 0:3, 0:4]
    np.testing.assert_array_equal(y, (100 + 1000 * p + 10 * w + x).reshape(5, 12))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_affine_select_builds_a_causal_mask(dtype: Any) -> None:
    x = data((128, 128), dtype)
    y = run(
        lambda dst, a: nisa.affine_select(dst, [[-1, 128]], 1, a, -1e30, nl.greater_equal),
        x,
        out=x.shape,
        dtype=np.dtype(dtype).name,
    )
    lower = np.tril(np.ones((128, 128), bool))
    np.testing.assert_array_equal(y, np.where(lower, x, np.float32(-1e30).astype(dtype)))


@pytest.mark.parametrize(("op", "function"), [("add", np.sum), ("maximum", np.max)])
def test_partition_reduce(op: str, function: Any) -> None:
    x = data((100, 6))
    y = run(lambda dst, a: nisa.tensor_partition_reduce(dst, getattr(nl, op), a), x, out=(1, 6))
    assert_close(y, function(f64(x), axis=0, keepdims=True), F32_SUM)


def test_gathers_within_partitions_and_groups() -> None:
    x = data((32, 20))
    per_row = np.random.default_rng(1).integers(0, 20, (32, 7)).astype(np.uint32)
    y = run(lambda dst, a, i: nisa.nc_n_gather(dst, a, i), x, per_row, out=(32, 7))
    np.testing.assert_array_equal(y, np.take_along_axis(x, per_row.astype(np.int64), 1))
    shared = np.random.default_rng(2).integers(0, 10, (32, 2)).astype(np.uint16)
    z = run(lambda dst, a, i: nisa.local_gather(dst, a, i, num_elem_per_idx=2), x, shared, out=(32, 64))
    for p in range(32):
        group = p // 16 * 16
        order = [int(shared[group + i % 16, i // 16]) for i in range(32)]
        np.testing.assert_array_equal(z[p], np.concatenate([x[p, 2 * k : 2 * k + 2] for k in order]))


def test_nonzero_with_count_works_on_every_sixteenth_partition() -> None:
    x = np.zeros((32, 8), np.float32)
    x[0, [1, 2, 5]] = 1
    y = run(lambda dst, a: nisa.nonzero_with_count(dst, a, 16, -1), x, out=(32, 9), dtype="int32")
    assert y[0].tolist() == [17, 18, 21, -1, -1, -1, -1, -1, 3]
    assert y[16].tolist() == [-1] * 8 + [0]
    assert (y[1] == 4).all()


def test_sequence_bounds_mark_segments_and_padding() -> None:
    ids = np.int32([[1, 1, 2, 2, 2, 0]])
    y = run(lambda dst, a: nisa.sequence_bounds(dst, a), ids, out=(1, 2, 6), dtype="int32")
    assert y[0].tolist() == [[0, 0, 2, 2, 2, 6], [2, 2, 5, 5, 5, -1]]


# --- DMA -------------------------------------------------------------------------------------------------------------
def test_dma_copy_converts_and_reshapes() -> None:
    x = data((6, 8))

    def kernel(a: Any) -> Any:
        out = nl.ndarray((4, 12), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        return out

    y = emulate(kernel, x).outputs
    assert y.tobytes() == x.reshape(4, 12).astype(BF16).tobytes()


@pytest.mark.parametrize("shape", [(16, 128), (5, 3, 16), (6, 2, 4, 8)])
def test_dma_transpose_swaps_first_and_last_axes(shape: tuple[int, ...]) -> None:
    x = data(shape, BF16)
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]

    def kernel(a: Any) -> Any:
        t = nl.ndarray(tuple(shape[i] for i in order), a.dtype)
        nisa.dma_transpose(dst=t, src=a, axes=order)
        return store(t)

    np.testing.assert_array_equal(emulate(kernel, x).outputs, x.transpose(order))


def test_gather_scatter_and_accumulate_by_dma() -> None:
    x, rows = data((10, 4)), np.int32([[3], [0], [9]])

    def kernel(a: Any, r: Any) -> Any:
        index = tile(r)
        picked = nl.ndarray((3, 4), a.dtype)
        nisa.dma_copy(dst=picked, src=a.ap(pattern=[[4, 3], [1, 4]], vector_offset=index))
        out = nl.ndarray((10, 4), a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        there = out.ap(pattern=[[4, 3], [1, 4]], vector_offset=index)
        nisa.dma_compute(dst=there, srcs=[there, picked], reduce_op=nl.add)
        return out, store(picked)

    out, picked = emulate(kernel, x, rows).outputs
    expected = x.copy()
    expected[rows[:, 0]] *= 2
    np.testing.assert_array_equal(picked, x[rows[:, 0]])
    np.testing.assert_array_equal(out, expected)


def test_out_of_bounds_rows_are_skipped_when_asked() -> None:
    x, rows = data((4, 3)), np.int32([[1], [7]])

    def kernel(a: Any, r: Any) -> Any:
        picked = nl.ndarray((2, 3), a.dtype)
        nisa.memset(picked, 0.0)
        source = a.ap(pattern=[[3, 2], [1, 3]], vector_offset=tile(r))
        nisa.dma_copy(dst=picked, src=source, oob_mode=nisa.oob_mode.skip)
        return store(picked)

    np.testing.assert_array_equal(emulate(kernel, x, rows).outputs, np.stack([x[1], np.zeros(3, np.float32)]))


# --- Registers -------------------------------------------------------------------------------------------------------
def test_registers_steer_loops_and_addresses() -> None:
    x, count = data((6, 5)), np.int32([[3]])

    def kernel(a: Any, n: Any) -> Any:
        limit = nisa.register_alloc()
        nisa.register_load(limit, tile(n))
        out = nl.ndarray((6, 5), a.dtype, buffer=nl.shared_hbm)
        zero = nl.zeros((6, 5), a.dtype)
        nisa.dma_copy(dst=out, src=zero)
        for i in nl.dynamic_range(limit):
            row = nl.ndarray((1, 5), a.dtype)
            nisa.dma_copy(dst=row, src=a.ap(pattern=[[5, 1], [1, 5]], scalar_offset=i))
            nisa.dma_copy(dst=out[nl.ds(i, 1), :], src=row)
        final = nisa.register_alloc(0)
        nisa.register_move(final, limit)
        cell = nl.ndarray((1, 1), nl.int32)
        nisa.register_store(cell, final)
        return out, store(cell)

    out, cell = emulate(kernel, x, count).outputs
    np.testing.assert_array_equal(out, np.concatenate([x[:3], np.zeros((3, 5), np.float32)]))
    assert int(cell[0, 0]) == 3


def test_float_to_integer_rounds_to_even_and_saturates() -> None:
    x = np.float32([[0.5, 1.5, -2.5, 300.0, -5.0]])
    y = run(lambda dst, a: nisa.tensor_copy(dst, a), x, out=x.shape, dtype="uint8")
    assert y[0].tolist() == [0, 2, 0, 255, 0]
