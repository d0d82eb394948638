# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Compiler errors by their codes, and what docs/compiler_failures.md says of them."""

from __future__ import annotations

import re
from pathlib import Path

TABLE = Path(__file__).parents[3] / "docs" / "compiler_failures.md"
"""In a checkout; an installed wheel has no documents."""

CODE = re.compile(r"NCC_[A-Z]+\d+")
_MOST_BYTES = 1_000_000


def codes_in(folder: Path, *texts: str) -> list[str]:
    """Codes of the compiler in texts, and in the logs below a check's folder, in order and each once."""
    logs = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".log") and path.is_file())
    found = [code for text in (*texts, *map(_end_of, logs)) for code in CODE.findall(text)]
    return [*dict.fromkeys(found)]


def known(code: str) -> str | None:
    """Cause, and what keeps clear of it, of the row that has the code; None without such a row or table."""
    try:
        lines = TABLE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and code in CODE.findall(cells[0]):
            return f"{cells[1]}; here: {cells[3]}"
    return None


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _MOST_BYTES))
        return file.read().decode(errors="replace")
