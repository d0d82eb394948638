# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""With the plain inverse no DeltaNet kernel uses the Tensor engine in a way that NKI's documents do not show.

They show row tiles and column tiles, one offset of which is zero, and nothing about two sums that grow in one bank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nki_emulator
import nki_emulator.isa
from qwen35.nki_kernels.chunk_pieces import PLAIN, TILED
from qwen35.nki_kernels.nki_seam import EMULATED
from support.own_kernels import addresses, all_kernels, small_arguments

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

DELTANET = [name for name in all_kernels() if name.startswith("deltanet")]
BANK = 2048
"""Bytes of a partition in a bank of PSUM."""


def matmuls(name: str, inverse: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keywords of every nc_matmul of a launch on one core, in order."""
    calls, nc_matmul = [], nki_emulator.isa.nc_matmul

    def record(**keywords: Any) -> None:
        calls.append(keywords)
        nc_matmul(**keywords)

    monkeypatch.setattr(nki_emulator.isa, "nc_matmul", record)
    options = {"inverse": inverse} if "chunk" in name else {}
    nki_emulator.emulate(all_kernels()[name], *small_arguments(name), timed=False, **options)
    return calls


def place(call: dict[str, Any]) -> tuple[Any, ...]:
    """Which elements of PSUM a matmul writes."""
    array = call["dst"].array
    return array.__array_interface__["data"][0], array.shape, array.strides


def bank(call: dict[str, Any]) -> tuple[int, int]:
    """The tensor in PSUM that a matmul writes, and the bank in it."""
    root = call["dst"].array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return id(root), (place(call)[0] - root.__array_interface__["data"][0]) % root.strides[0] // BANK


@pytest.mark.parametrize("name", [name for name in DELTANET if "chunk" in name])
def test_a_kernel_of_prompts_uses_no_sub_array(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [call["tile_position"] for call in matmuls(name, PLAIN, monkeypatch) if call.get("tile_position")] == []


@pytest.mark.parametrize("name", DELTANET)
def test_a_sub_array_begins_at_the_first_row_or_the_first_column(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [call for call in matmuls(name, PLAIN, monkeypatch) if all(call.get("tile_position", (0, 0)))]


@pytest.mark.parametrize("name", DELTANET)
def test_a_sum_is_complete_before_another_begins_in_its_bank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    last: dict[tuple[int, int], Any] = {}
    calls = matmuls(name, PLAIN, monkeypatch)
    assert calls
    for call in calls:
        if call.get("accumulate"):
            assert last[bank(call)] == place(call), call
        last[bank(call)] = place(call)


def test_the_tiled_inverse_has_sub_arrays_off_the_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = matmuls("deltanet_fused_chunked_layer", TILED, monkeypatch)
    assert any(all(call.get("tile_position", (0, 0))) for call in calls)


def test_the_tiled_inverse_adds_no_two_row_tiles_in_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    from_row_tile: set[int] = set()  # elements of PSUM that a sub-array wrote or added to
    for call in matmuls("deltanet_fused_chunked_layer", TILED, monkeypatch):
        elements = {*addresses(call["dst"].array).tolist()}
        if not call.get("tile_position"):
            from_row_tile -= elements
        else:
            assert not (call["accumulate"] and from_row_tile & elements), call
            from_row_tile |= elements
