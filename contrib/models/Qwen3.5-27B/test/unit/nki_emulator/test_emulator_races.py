# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Accesses of two cores to the same bytes that nothing orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiWarning, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import tile

Body = Callable[[int, Any, Any], None]


def launch(body: Body) -> tuple[str, ...]:
    """Warnings of ``body(core, x, t)`` on two cores: x [128, 8] in shared HBM, t [128, 8] a tile of each core."""

    def kernel(x: Any) -> None:
        t = nl.ndarray((128, 8), nl.float32)
        nisa.memset(t, 1.0)
        body(nl.program_id(0), x, t)

    return emulate(kernel, np.zeros((128, 8), np.float32), grid=2).report.warnings


def load(t: Any, x: Any) -> None:
    nisa.dma_copy(dst=t, src=x)


def both_in_place(core: int, x: Any, t: Any) -> None:
    load(t, x)
    load(x, t)


def both_write(core: int, x: Any, t: Any) -> None:
    load(x, t)


def one_reads_what_the_other_writes(core: int, x: Any, t: Any) -> None:
    if core == 0:
        load(x, t)
    else:
        load(t, x)


def one_writes_what_the_other_has_read(core: int, x: Any, t: Any) -> None:
    if core == 0:
        load(t, x)
    else:
        load(x, t)


def overlapping_rows(core: int, x: Any, t: Any) -> None:
    rows = slice(0, 65) if core == 0 else slice(64, 128)
    load(x[rows], t[0:65] if core == 0 else t[0:64])


def after_the_barrier(core: int, x: Any, t: Any) -> None:
    nisa.core_barrier(data=x, cores=(0, 1))
    both_write(core, x, t)


def in_scattered_rows(core: int, x: Any, t: Any) -> None:
    index = nl.ndarray((4, 1), nl.int32)
    nisa.iota(index, [[0, 1]], offset=3 * core, channel_multiplier=1)
    load(x.ap(pattern=[[8, 4], [1, 8]], vector_offset=index), t[0:4])


@pytest.mark.parametrize(
    "body",
    [
        both_in_place,
        both_write,
        one_reads_what_the_other_writes,
        one_writes_what_the_other_has_read,
        overlapping_rows,
        after_the_barrier,
        in_scattered_rows,
    ],
)
def test_unordered_accesses_to_the_same_bytes_are_warned_of(body: Body) -> None:
    with pytest.warns(
        NkiWarning, match=r"core \d (reads|writes) bytes of arg0 that core \d (reads|writes), and they do"
    ):
        assert launch(body)


def own_rows(core: int, x: Any, t: Any) -> None:
    load(x[64 * core : 64 * core + 64], t[0:64])


def own_columns(core: int, x: Any, t: Any) -> None:
    load(x[:, core::2], t[:, core::2])


def own_scattered_rows(core: int, x: Any, t: Any) -> None:
    index = nl.ndarray((4, 1), nl.int32)
    nisa.iota(index, [[0, 1]], offset=core, channel_multiplier=2)
    load(x.ap(pattern=[[8, 4], [1, 8]], vector_offset=index), t[0:4])


def both_read(core: int, x: Any, t: Any) -> None:
    load(t, x)


def a_barrier_in_between(core: int, x: Any, t: Any) -> None:
    own_rows(core, x, t)
    nisa.core_barrier(data=x, cores=(0, 1))
    load(t, x)


def an_exchange_in_between(core: int, x: Any, t: Any) -> None:
    if core == 0:
        load(x, t)
    nisa.sendrecv(src=t, dst=t, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0)
    if core == 1:
        load(t, x)


def own_private_memory(core: int, x: Any, t: Any) -> None:
    load(nl.ndarray((128, 8), nl.float32, buffer=nl.private_hbm), t)


@pytest.mark.parametrize(
    "body",
    [
        own_rows,
        own_columns,
        own_scattered_rows,
        both_read,
        a_barrier_in_between,
        an_exchange_in_between,
        own_private_memory,
    ],
)
def test_ordered_or_separate_accesses_are_not(body: Body) -> None:
    assert launch(body) == ()


def test_large_tensors_are_told_apart_by_their_rows() -> None:
    def kernel(x: Any) -> None:
        core = nl.program_id(0)
        t = tile(x[0:128])
        nisa.dma_copy(dst=x[2048 + 128 * core : 2176 + 128 * core], src=t)

    assert emulate(kernel, np.zeros((4096, 1024), np.float32), grid=2).report.warnings == ()


def test_one_core_races_with_nobody() -> None:
    def kernel(x: Any) -> None:
        t = tile(x)
        nisa.dma_copy(dst=x, src=t)

    assert emulate(kernel, np.zeros((128, 8), np.float32)).report.warnings == ()
