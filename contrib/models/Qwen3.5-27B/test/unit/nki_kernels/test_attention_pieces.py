# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from qwen35.nki_kernels.attention_pieces import Pool, check_heads, make_identity, parts, restart, take, width
from qwen35.nki_kernels.nki_seam import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")


def test_buffers_are_taken_in_turn_and_from_the_first_after_a_restart() -> None:
    pool = Pool(tiles=["a", "b", "c"])
    assert [take(pool) for _ in range(5)] == ["a", "b", "c", "a", "b"]
    restart(pool)
    assert take(pool) == "a"


@pytest.mark.parametrize(("E", "expected"), [(64, (1, 64)), (128, (1, 128)), (256, (2, 128))])
def test_a_head_dim_is_contracted_in_parts_of_at_most_128(E: int, expected: tuple[int, int]) -> None:
    assert (parts(E), width(E)) == expected


@pytest.mark.parametrize("dtype", [nl.float32, nl.bfloat16])
def test_the_identity(dtype: Any) -> None:
    def kernel() -> Any:
        out = nl.ndarray((8, 8), dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=make_identity(8, dtype))
        return out

    np.testing.assert_array_equal(np.asarray(emulate(kernel).outputs, dtype=np.float32), np.eye(8))


@pytest.mark.parametrize(
    ("heads", "message"), [((6, 1, 96), "head_dim is 96: 64, 128 or 256"), ((5, 2, 64), "5 query heads are not")]
)
def test_heads_that_the_kernels_do_not_take(heads: tuple[int, int, int], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_heads(*heads)
