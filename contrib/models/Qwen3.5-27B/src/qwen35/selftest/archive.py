# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One file to send: the page, the results, the logs, and of checks that failed what the compiler left."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

NAME = "selftest-report.tar.gz"
TOP_FILES = ("report.md", "results.json", "settings.json")
WEIGHTS = (".safetensors", ".pt", ".bin")
"""What weights are kept in: never part of it."""

MOST_BYTES_A_FILE = 20_000_000
MOST_BYTES = 100_000_000
"""Of all files before they are packed."""

LOG_END_BYTES = 1_000_000


def write_archive(directory: Path, failed: Collection[str]) -> Path:
    """Pack a self-test's directory; `failed` are the names of checks whose compiler artifacts are wanted.

    Files that are too large are named in left_out.txt; of logs among them the end is there, as log.txt.end.
    """
    unfinished, left_out, taken = directory / f".{NAME}", [], 0
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in _files(directory, failed):
            size, name = path.stat().st_size, path.relative_to(directory).as_posix()
            if path.suffix in WEIGHTS:
                continue
            if size > MOST_BYTES_A_FILE or taken + size > MOST_BYTES:
                left_out.append(f"{name}: {size:,} bytes")
                if path.name == "log.txt":
                    _add_end(archive, path, f"selftest/{name}.end")
                continue
            archive.add(path, f"selftest/{name}", recursive=False)
            taken += size
        if left_out:
            note = directory / ".left_out.txt"
            note.write_text("\n".join(left_out) + "\n", encoding="utf-8")
            archive.add(note, "selftest/left_out.txt")
            note.unlink()
    return unfinished.replace(directory / NAME)


def _add_end(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add the last `LOG_END_BYTES` of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_END_BYTES))
        end = file.read()
    entry = tarfile.TarInfo(name)
    entry.size = len(end)
    archive.addfile(entry, io.BytesIO(end))


def _files(directory: Path, failed: Collection[str]) -> Iterator[Path]:
    """What is wanted, the small first."""
    yield from (path for name in TOP_FILES if (path := directory / name).is_file())
    folders = sorted(path for path in (directory / "checks").glob("*") if path.is_dir())
    for folder in folders:
        yield from sorted(path for path in folder.glob("*") if path.is_file())
    for folder in folders:
        if folder.name in failed:
            yield from sorted(path for path in (folder / "work").rglob("*") if path.is_file() and not path.is_symlink())
