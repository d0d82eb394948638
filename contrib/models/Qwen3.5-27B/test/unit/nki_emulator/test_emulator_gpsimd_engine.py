# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the GpSimd engine against independent NumPy formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, F32_SUM, assert_close, data, f64, run


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
