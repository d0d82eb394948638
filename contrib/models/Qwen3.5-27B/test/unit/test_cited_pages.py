# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Pages of the Neuron documentation that code and documents cite are pages that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED: dict[str, list[str]] = json.loads((ROOT / "test" / "data" / "sdk_pages.json").read_text(encoding="utf-8"))
"""{page of github.com/aws-neuron/aws-neuron-sdk: releases that have it}, by tools/record_nki_signatures.py."""

NEWEST = "v2.32.0"
FOLDERS = "|".join(sorted({page.split("/")[0] for page in RECORDED}))
CITED = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")
NAMES = "|".join(sorted({Path(page).stem for page in RECORDED if re.search("_arch|[-_]guide", Path(page).stem)}))
BARE = re.compile(rf"(?<![\w./-])(?:{NAMES})(?:\.rst)?(?![\w./-])")
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.md"), *(ROOT / "docs").glob("*.md")]


def citations() -> Iterator[tuple[str, str]]:
    for source in sorted(SOURCES):
        text = source.read_text(encoding="utf-8")
        for page in CITED.findall(text) + BARE.findall(text):
            yield source.relative_to(ROOT).as_posix(), page


def test_every_cited_page_is_in_a_release_that_the_kernels_are_for() -> None:
    found = list(citations())
    assert len(found) > 50
    assert [f"{source}: {page}" for source, page in found if page not in RECORDED] == []


@pytest.mark.parametrize("folder", ["src/qwen35/", "docs/"])
def test_the_newest_release_has_what_the_model_cites(folder: str) -> None:
    # The emulator is of NKI 0.3.0, and may cite pages that only its release has.
    stale = [f"{source}: {page}" for source, page in citations() if NEWEST not in RECORDED.get(page, [])]
    assert [line for line in stale if line.startswith(folder)] == []
