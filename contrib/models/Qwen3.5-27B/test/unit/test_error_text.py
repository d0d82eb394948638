# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What errors quote is one line, and not too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen35.error_text import first_three, one_line, shorten, shown


@given(st.text())
def test_a_line_has_no_end_within_and_can_be_printed(text: str) -> None:
    line = one_line(text, most=40)
    assert len(line) <= 40 and len((line + "x").splitlines()) == 1 and line.isprintable()
    line.encode("utf-8")


def test_long_values_and_lists_are_cut() -> None:
    assert shown("ab") == "'ab'" and len(shown(["a"] * 1000)) == 100
    assert first_three("abc") == "a, b, c" and first_three("abcde") == "a, b, c and 2 more"


def test_an_address_with_its_data_is_shown_without_them() -> None:
    assert shorten("data:image/png;base64,AAAA" * 9) == "data:image/png;base64,... (234 characters)"
    assert shorten("a\nb") == "a b" and shorten("x" * 200).endswith("x... (200 characters)")
