# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Capacity of SBUF and PSUM, and how long a tensor is live."""

from __future__ import annotations

from typing import Any

import pytest

from nki_emulator import NkiValidationError, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl


def hold(count: int, shape: tuple[int, ...], buffer: Any) -> None:
    """Write ``count`` tensors, then read all of them."""
    tensors = [nl.ndarray(shape, nl.float32, buffer=buffer) for _ in range(count)]
    for _ in range(2):
        for t in tensors:
            nisa.tensor_scalar(t, t, nl.multiply, 1.0)


def test_sbuf_overflow_names_what_is_live() -> None:
    shape, size, capacity = (128, 1024), 4096, int(costs.SBUF_PARTITION_BYTES)
    fit = capacity // size
    assert emulate(hold, fit, shape, nl.sbuf).report.cores[0].peak_sbuf_bytes == fit * size
    words = (
        rf"at instruction {fit} of this core {fit + 1} tensors with {(fit + 1) * size} bytes are live in sbuf.*"
        rf"sbuf has {capacity} bytes"
    )
    with pytest.raises(NkiValidationError, match=words):
        emulate(hold, fit + 1, shape, nl.sbuf)
    assert emulate(hold, fit + 1, shape, nl.sbuf, capacity=False).report.cores[0].peak_sbuf_bytes == (fit + 1) * size


@pytest.mark.parametrize(
    ("partitions", "side_by_side"), [(1, 4), (32, 4), (33, 2), (64, 2), (65, 1), (96, 1), (128, 1)]
)
def test_sbuf_tensors_of_few_partitions_lie_side_by_side(partitions: int, side_by_side: int) -> None:
    fit = side_by_side * (int(costs.SBUF_PARTITION_BYTES) // 4096)
    emulate(hold, fit, (partitions, 1024), nl.sbuf)
    with pytest.raises(NkiValidationError, match="are live in sbuf"):
        emulate(hold, fit + side_by_side, (partitions, 1024), nl.sbuf)


def test_a_psum_tensor_of_few_partitions_takes_its_banks_whole() -> None:
    with pytest.raises(NkiValidationError, match="are live in psum"):
        emulate(hold, 9, (32, 512), nl.psum)


def test_the_usable_memory_is_what_the_runtime_leaves() -> None:
    def kernel(first_byte: int) -> None:
        nisa.memset(nl.ndarray((128, 64), nl.float32, address=(0, first_byte)), 0.0)

    usable = 224 * 1024 - 16384 - 8
    assert nl.tile_size.total_available_sbuf_size == usable
    emulate(kernel, usable - 256)
    with pytest.raises(NkiValidationError, match=rf"128 partitions of {usable} bytes"):
        emulate(kernel, usable - 252)


def test_a_ninth_psum_bank_does_not_exist() -> None:
    assert emulate(hold, 8, (1, 1), nl.psum).report.cores[0].peak_psum_banks == 8
    with pytest.raises(NkiValidationError, match=r"9 tensors with 9 banks are live in psum.*psum has 8 banks"):
        emulate(hold, 9, (1, 1), nl.psum)


def test_a_tensor_is_live_from_its_first_to_its_last_access() -> None:
    def kernel() -> None:
        names = [nl.ndarray((1, 1), nl.float32, buffer=nl.psum) for _ in range(100)]  # all referenced to the end
        for t in names:
            nisa.memset(t, 0.0)
            nisa.tensor_scalar(t, t, nl.add, 1.0)

    assert emulate(kernel).report.cores[0].peak_psum_banks == 1


def rounds(fill: Any, *, sizes: int = 8, count: int = 2) -> Any:
    """A kernel that fills and reads ``sizes`` scratch tiles of 32 KiB per partition in each of ``count`` rounds."""

    def kernel() -> None:
        tiles = [nl.ndarray((128, 8192), nl.float32) for _ in range(sizes)]
        sink = nl.ndarray((128, 8192), nl.float32)
        for _ in range(count):
            for t in tiles:
                fill(t)
                nisa.tensor_copy(dst=sink, src=t)

    return kernel


def whole(t: Any) -> None:
    nisa.memset(t, 1.0)


def halves(t: Any) -> None:
    nisa.memset(t[:, 0:4096], 1.0)
    nisa.memset(t[:, 4096:8192], 1.0)


def interleaved(t: Any) -> None:
    for start in (0, 1):
        nisa.memset(t[:, start::2], 1.0)


def partition_halves(t: Any) -> None:
    for start in (0, 64):
        nisa.memset(t[start : start + 64], 1.0)


def reshaped(t: Any) -> None:
    nisa.memset(t.reshape((128, 64, 128)), 1.0)


def half_precision(t: Any) -> None:
    nisa.memset(t.view(nl.bfloat16), 1.0)


@pytest.mark.parametrize("fill", [whole, halves, interleaved, partition_halves, reshaped, half_precision])
def test_scratch_that_every_round_fills_anew_is_dead_in_between(fill: Any) -> None:
    assert emulate(rounds(fill)).report.cores[0].peak_sbuf_bytes == 2 * 32 * 1024


def first_half(t: Any) -> None:
    nisa.memset(t[:, 0:4096], 1.0)


def in_place(t: Any) -> None:
    nisa.tensor_scalar(t, t, nl.add, 1.0)


def predicated(t: Any) -> None:
    mask = nl.ndarray((128, 8192), nl.uint8)
    nisa.memset(mask, 1)
    nisa.tensor_copy_predicated(dst=t, src=1.0, predicate=mask)


@pytest.mark.parametrize("fill", [first_half, in_place, predicated])
def test_content_that_is_read_again_stays_live(fill: Any) -> None:
    with pytest.raises(NkiValidationError, match=r"tensors with \d+ bytes are live in sbuf"):
        emulate(rounds(fill))


def test_a_part_that_nobody_reads_again_is_dead() -> None:
    def kernel() -> None:
        tiles = [nl.ndarray((128, 8192), nl.float32) for _ in range(8)]
        small = nl.ndarray((128, 16), nl.float32)
        for _ in range(2):
            for t in tiles:
                nisa.memset(t[:, 0:16], 1.0)
                nisa.tensor_copy(dst=small, src=t[:, 0:16])

    assert emulate(kernel).report.cores[0].peak_sbuf_bytes == 32 * 1024 + 64


@pytest.mark.parametrize(("accumulate", "banks"), [(False, 1), (True, 2)])
def test_a_product_that_is_added_to_stays_live(accumulate: bool, banks: int) -> None:
    def kernel() -> None:
        t, out = nl.ndarray((128, 128), nl.float32), nl.ndarray((128, 128), nl.float32)
        nisa.memset(t, 1.0)
        first, second = (nl.ndarray((128, 128), nl.float32, buffer=nl.psum) for _ in range(2))
        nisa.nc_matmul(first, t, t)
        nisa.tensor_copy(out, first)
        nisa.nc_matmul(second, t, t)
        nisa.tensor_copy(out, second)
        nisa.nc_matmul(first, t, t, accumulate=accumulate)
        nisa.tensor_copy(out, first)

    assert emulate(kernel).report.cores[0].peak_psum_banks == banks
