# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Capacity of SBUF and PSUM, and how long a tensor is live."""

from __future__ import annotations

from typing import Any

import pytest

from nki_emulator import NkiValidationError, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl


def hold(count: int, shape: tuple[int, ...], buffer: Any) -> None:
    """Write ``count`` tensors, then read all of them."""
    tensors = [nl.ndarray(shape, nl.float32, buffer=buffer) for _ in range(count)]
    for _ in range(2):
        for t in tensors:
            nisa.tensor_scalar(t, t, nl.multiply, 1.0)


def test_sbuf_overflow_names_what_is_live() -> None:
    shape = (128, 1024)  # 4 KiB per partition, so that 48 fit into 192 KiB
    assert emulate(hold, 48, shape, nl.sbuf).report.cores[0].peak_sbuf_bytes == 192 * 1024
    words = r"at instruction 48 of this core 49 tensors with 200704 bytes are live in sbuf.*sbuf has 196608 bytes"
    with pytest.raises(NkiValidationError, match=words):
        emulate(hold, 49, shape, nl.sbuf)
    assert emulate(hold, 49, shape, nl.sbuf, capacity=False).report.cores[0].peak_sbuf_bytes == 49 * 4096


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
