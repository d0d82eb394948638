# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""With the plain inverse no DeltaNet kernel uses the Tensor engine in a way that NKI's documents do not show."""

from __future__ import annotations

from typing import Any

import pytest

import nki_emulator
import nki_emulator.isa
from qwen35.nki_kernels.chunk_pieces import PLAIN, TILED
from qwen35.nki_kernels.nki_seam import EMULATED
from support.own_kernels import addresses, all_kernels, small_arguments

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

DELTANET = [name for name in all_kernels() if name.startswith("deltanet")]


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


@pytest.mark.parametrize("name", DELTANET)
def test_no_sub_array_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [call["tile_position"] for call in matmuls(name, PLAIN, monkeypatch) if call.get("tile_position")] == []


@pytest.mark.parametrize("name", DELTANET)
def test_a_sum_is_complete_before_another_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = matmuls(name, PLAIN, monkeypatch)
    assert calls
    for before, call in zip([{}, *calls[:-1]], calls, strict=True):
        if call.get("accumulate"):
            assert place(before) == place(call), call


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
