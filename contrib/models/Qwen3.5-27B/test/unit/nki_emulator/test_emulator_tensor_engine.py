# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Tensor engine against independent NumPy formulas, over types and edge shapes."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nki_emulator import NkiWarning, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, F32_SUM, assert_close, data, f64, run, store, tile


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


def groups(order: str, *, bank_each: bool = False) -> tuple[str, ...]:
    """Warnings of matmuls into two destinations A and B, of one bank or of two; lower case starts a group anew."""

    def kernel() -> None:
        t = nl.ndarray((64, 64), nl.bfloat16)
        nisa.memset(t, 1.0)
        both = nl.ndarray((64, 2, 512 if bank_each else 64), nl.float32, buffer=nl.psum)
        for step in order:
            nisa.nc_matmul(both[:, "AB".index(step.upper()), 0:64], t, t, accumulate=step.isupper())

    return emulate(kernel).report.warnings


@pytest.mark.parametrize("order", ["aAbB", "aAAbBB", "abab", "aAbaA", "abB", "aAbBaAbB"])
def test_groups_one_after_the_other_may_share_a_bank(order: str) -> None:
    assert groups(order) == ()


@pytest.mark.parametrize("order", ["abA", "abAB", "aAbA", "abBA"])
def test_a_group_that_goes_on_after_another_in_its_bank_is_warned_of(order: str) -> None:
    with pytest.warns(NkiWarning, match=r"nc_matmul: dst .* while another group of PSUM bank 0 .* is open"):
        warned = groups(order)
    assert len(warned) >= 1
    assert groups(order, bank_each=True) == ()


@pytest.mark.parametrize(("follows", "warned"), [(False, False), (True, True)])
def test_a_part_of_a_group_belongs_to_it(follows: bool, warned: bool) -> None:
    def kernel() -> None:
        t = nl.ndarray((64, 64), nl.bfloat16)
        nisa.memset(t, 1.0)
        p = nl.ndarray((64, 2, 64), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(p[:, 0], t, t, accumulate=False)
        if follows:
            nisa.nc_matmul(p[:, 1], t, t, accumulate=False)
        nisa.nc_matmul(p[:, 0, 0:32], t, t[:, 0:32], accumulate=True)
        nisa.nc_matmul(p[:, 0, 32:64], t, t[:, 32:64], accumulate=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NkiWarning)
        assert bool(emulate(kernel).report.warnings) == warned


def test_interleaved_columns_are_groups_of_their_own() -> None:
    def kernel() -> None:
        t = nl.ndarray((64, 32), nl.bfloat16)
        nisa.memset(t, 1.0)
        p = nl.ndarray((32, 32, 2), nl.float32, buffer=nl.psum)
        for accumulate in (False, True):
            for column in (0, 1):
                nisa.nc_matmul(p[:, :, column], t, t, accumulate=accumulate)

    with pytest.warns(NkiWarning, match="is open"):
        emulate(kernel)


def test_groups_in_other_partitions_of_a_bank_share_it() -> None:
    def kernel() -> None:
        t = nl.ndarray((64, 32), nl.bfloat16)
        nisa.memset(t, 1.0)
        p = nl.ndarray((64, 32), nl.float32, buffer=nl.psum, address=(0, 2048))
        for accumulate in (False, True):
            for row in (0, 32):
                nisa.nc_matmul(p[row : row + 32], t, t, accumulate=accumulate)

    with pytest.warns(NkiWarning, match="bank 1 of physical_psum is open"):
        emulate(kernel)
