# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What errors quote of values that others gave: cut to what fits a line, and nothing that breaks it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def shown(value: Any, most: int = 100) -> str:
    """`repr`, cut to a length that fits a line of an error."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(text: str, most: int = 1000) -> str:
    """A line of an error that quotes names from a file: nothing in it breaks the line, and it ends."""
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return line if len(line) <= most else line[: most - 3] + "..."


def first_three(names: Iterable[str]) -> str:
    """Names joined by commas; of more than three, the first three and how many more there are."""
    found = list(names)
    rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + rest


def shorten(text: str, limit: int = 120) -> str:
    """A text as errors show it: one line of at most about `limit` characters, and no data of a data: address."""
    line = " ".join(text.split())
    if (data := re.match(r"data:[^,]{0,80},", line, re.IGNORECASE)) is not None:
        return f"{data[0]}... ({len(text)} characters)"
    return line if len(line) <= limit else f"{line[:limit]}... ({len(text)} characters)"
