# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Views, access patterns, unwritten memory and tensors with an address."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiValidationError, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import grid_data, store, tile


@pytest.mark.parametrize(
    "key",
    [
        (slice(None), 1),
        (Ellipsis, slice(0, 2)),
        (slice(32, 64), slice(None), slice(None, None, 2)),
        (slice(None), slice(1, 3), -1),
        (slice(-32, None), slice(0, 1)),
    ],
)
def test_slices_are_views_with_numpy_shapes(key: Any) -> None:
    x = grid_data(64, 3, 4)

    def kernel(a: Any) -> Any:
        t = tile(a)
        part = t[key]
        assert part.shape == x[key].shape
        nisa.memset(part, -1.0)
        return store(t)

    expected = x.copy()
    expected[key] = -1
    np.testing.assert_array_equal(emulate(kernel, x).outputs, expected)


def test_offset_and_pattern_describe_a_view() -> None:
    def kernel() -> None:
        t = nl.ndarray((16, 4, 8), nl.bfloat16)
        part = t[:, 1, 2::2]
        assert part.offset == 10
        assert part.get_pattern() == [[32, 16], [2, 3]]
        assert t[3, 2].shape == (8,)
        assert (t.dtype, t.buffer, part.ndim, part.size) == ("bfloat16", nl.sbuf, 2, 48)

    emulate(kernel)


def test_access_patterns_stride_repeat_and_reinterpret() -> None:
    x = grid_data(4, 12)

    def kernel(a: Any) -> Any:
        t = tile(a)
        strided = nl.ndarray((4, 3, 2), nl.float32)
        nisa.tensor_copy(dst=strided, src=t.ap(pattern=[[12, 4], [4, 3], [0, 2]], offset=1))
        halves = t.ap(pattern=[[24, 4], [1, 24]], dtype=nl.bfloat16)
        assert halves.shape == (4, 24)
        assert t.view(nl.bfloat16).shape == (4, 24)
        return store(strided), store(halves)

    strided, halves = emulate(kernel, x).outputs
    np.testing.assert_array_equal(strided, np.repeat(x[:, 1::4, None], 2, axis=2))
    assert halves.tobytes() == x.tobytes()


def test_reshape_keeps_memory_and_partitions() -> None:
    x = grid_data(8, 12)

    def kernel(a: Any) -> Any:
        t = tile(a)
        nisa.memset(t.reshape((8, 3, 4))[:, 2, :], 0.0)
        return store(t)

    expected = x.copy()
    expected[:, 8:] = 0
    np.testing.assert_array_equal(emulate(kernel, x).outputs, expected)


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda t: t[:, 0:99], "slice 0:99 on axis 1"),
        (lambda t: t[8], "size is 8"),
        (lambda t: t[::2], "partition step 2"),
        (lambda t: t[:, np.array([0, 2])], "an integer, a register, a slice"),
        (lambda t: t.reshape((4, 24)), "partition axis cannot change"),
        (lambda t: t.reshape((8, 13)), "element counts"),
        (lambda t: t[:, 0:8].reshape((8, 2, 4)).ap([[12, 8], [1, 4]]), "already indexed"),
        (lambda t: t.ap([[24, 4], [1, 12]]), "partition step 24"),
        (lambda t: t.ap([[12, 8], [1, 13]]), "reaches element 96"),
        (lambda t: t.ap([[12, 7], [1, 13]]), "leaves the 12 elements of a partition"),
        (lambda t: t.broadcast_to((16, 12)), "partitions cannot be broadcast"),
        (lambda t: t.__setitem__((0, 0), 1.0), "assignment does not"),
        (lambda t: bool(t), "not on tensor contents"),
    ],
)
def test_illegal_views_name_the_rule(misuse: Any, words: str) -> None:
    def kernel() -> None:
        misuse(nl.ndarray((8, 12), nl.float32))

    with pytest.raises(NkiValidationError, match=words):
        emulate(kernel)


def test_without_strict_checks_a_given_tensor_is_true() -> None:
    def kernel(a: Any, bias: Any = None) -> Any:
        t = tile(a)
        if bias:  # as nki-library asks whether it was given
            nisa.tensor_tensor(dst=t, data1=t, data2=tile(bias), op=nl.add)
        assert not bias or (t and t[0:2, 1:3] and bias is not None)
        return store(t)

    x = grid_data(4, 4)
    np.testing.assert_array_equal(emulate(kernel, x, x, strict=False).outputs, 2 * x)
    np.testing.assert_array_equal(emulate(kernel, x, strict=False).outputs, x)
    with pytest.raises(NkiValidationError, match="whether a tensor was given is asked by == None"):
        emulate(kernel, x, x)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The whole tensor, as nki-library's TensorView gives it; then columns and rows of it.
        (([[12, 8], [1, 12]], 0), ([[12, 8], [1, 12]], 0), (slice(None), slice(None))),
        (([[12, 8], [1, 12]], 0), ([[12, 8], [1, 4]], 4), (slice(None), slice(4, 8))),
        (([[12, 8], [1, 12]], 0), ([[12, 4], [2, 6]], 0), (slice(0, 4), slice(0, 12, 2))),
        # A part whose elements follow each other: the second pattern counts the elements of the part.
        (([[12, 8], [1, 6]], 6), ([[6, 8], [1, 2]], 1), (slice(None), slice(7, 9))),
        (([[12, 4], [1, 12]], 48), ([[12, 2], [1, 12]], 12), (slice(5, 7), slice(None))),
    ],
)
@pytest.mark.parametrize("in_hbm", [False, True])
def test_without_strict_checks_patterns_of_patterns_count_the_elements_of_the_view(
    first: Any, second: Any, expected: Any, in_hbm: bool
) -> None:
    x = grid_data(8, 12)

    def kernel(a: Any) -> Any:
        t = a if in_hbm else tile(a)
        part = t.ap(pattern=first[0], offset=first[1]).ap(pattern=second[0], offset=second[1])
        out = nl.ndarray(part.shape, a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=part)
        return out

    if in_hbm and first[0][1][1] != 12:
        with pytest.raises(NkiValidationError, match="already indexed"):
            emulate(kernel, x, strict=False)
        return
    np.testing.assert_array_equal(emulate(kernel, x, strict=False).outputs, x[expected])
    with pytest.raises(NkiValidationError, match="already indexed"):
        emulate(kernel, x)


def test_a_pattern_of_a_strided_view_is_refused_in_any_case() -> None:
    def kernel() -> None:
        t = nl.ndarray((8, 12), nl.float32)
        t.ap(pattern=[[12, 8], [2, 6]]).ap(pattern=[[6, 8], [1, 2]])

    with pytest.raises(NkiValidationError, match="already indexed"):
        emulate(kernel, strict=False)


def test_a_single_element_is_a_view() -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)

    def kernel(a: Any) -> Any:
        t = tile(a)
        nisa.dma_copy(dst=t[0, 0], src=a[1, 3])
        nisa.memset(dst=t[0, 1], value=-1.0)
        nisa.tensor_copy(dst=t[0, 2], src=t[0, 1])
        nisa.tensor_scalar(dst=t[0, 3], data=t[0, -1], op0=nl.add, operand0=10.0)
        out = store(t)
        nisa.dma_copy(dst=out[1, 0], src=t[0, 3])
        return out

    expected = x.copy()
    expected[0] = [7, -1, -1, 13]
    expected[1, 0] = 13
    np.testing.assert_array_equal(emulate(kernel, x).outputs, expected)


def test_a_single_element_says_which_partition_it_is_in() -> None:
    def kernel() -> None:
        nisa.memset(nl.ndarray((4, 4), nl.float32)[3, 0], 0.0)

    with pytest.raises(NkiValidationError, match="dst occupies 1 partitions from 3; 1 partitions start at 0"):
        emulate(kernel)


def test_an_integer_index_leaves_a_tile_a_free_axis() -> None:
    x = grid_data(128, 4)

    def kernel(a: Any) -> Any:
        t = tile(a)
        column = t[:, 2]
        assert (column.shape, column[:64, :1].shape, t[5].shape, a[:, 2].shape) == ((128, 1), (64, 1), (4,), (128,))
        deep = nl.ndarray((16, 3, 5), nl.float32)
        assert (deep[:, 1, 4].shape, deep[:, 1].shape, deep[0, 1, 4].shape) == ((16, 1), (16, 5), (1,))
        nisa.tensor_scalar(dst=t[:, 0], data=t[:, 1], op0=nl.multiply, operand0=column)
        return store(t[:, 0]), store(column[:128, :1])

    product, column = emulate(kernel, x).outputs
    np.testing.assert_array_equal(product, x[:, 1:2] * x[:, 2:3])
    np.testing.assert_array_equal(column, x[:, 2:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
def test_unwritten_floats_are_nan(dtype: str, buffer: Any) -> None:
    out = emulate(lambda: store(nl.ndarray((4, 5), dtype, buffer=buffer))).outputs
    assert np.isnan(out.astype(np.float32)).all()


def test_unwritten_integers_are_four_and_unwritten_parts_show_in_a_matmul() -> None:
    def kernel() -> Any:
        w = nl.ndarray((2, 3), nl.float32)
        nisa.memset(w[0:1], 1.0)
        p = nl.ndarray((3, 3), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=p, stationary=w, moving=w)
        return store(p), store(nl.ndarray((2, 2), nl.int32))

    product, integers = emulate(kernel).outputs
    assert np.isnan(product).all()
    assert (integers == 4).all()


def test_placed_tensors_share_bytes() -> None:
    def kernel() -> Any:
        a = nl.ndarray((4, 8), nl.float32, address=(0, 1024))
        b = nl.ndarray((4, 4), nl.float32, address=(0, 1040))
        nisa.memset(a, 1.0)
        nisa.memset(b, 2.0)
        return store(a)

    result = emulate(kernel)
    assert result.outputs[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert result.report.cores[0].peak_sbuf_bytes == 1056


def test_each_placed_psum_tensor_starts_a_new_accumulation() -> None:
    def kernel(a: Any) -> Any:
        t = tile(a)
        tensors = [nl.ndarray((1, 1), nl.float32, buffer=nl.psum, address=(0, 2048)) for _ in range(2)]
        for p in tensors:
            nisa.nc_matmul(p, t, t)
        return store(tensors[1])

    assert float(emulate(kernel, np.ones((1, 1), np.float32)).outputs[0, 0]) == 1.0
