# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The file to send."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from qwen35.selftest import archive
from qwen35.selftest.archive import write_archive


def files(root: Path, **contents: int) -> None:
    """Files of so many bytes."""
    for name, size in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def names(path: Path) -> set[str]:
    with tarfile.open(path) as packed:
        return {name.removeprefix("selftest/") for name in packed.getnames()}


def test_it_has_the_page_all_logs_and_the_compiler_s_files_of_failures_without_weights(tmp_path: Path) -> None:
    files(
        tmp_path,
        **{
            "report.md": 10,
            "results.json": 10,
            "checks/fused/log.txt": 10,
            "checks/fused/result.json": 10,
            "checks/fused/work/compiler/graph.hlo": 10,
            "checks/mini/log.txt": 10,
            "checks/mini/work/compiler/log-neuron-cc.txt": 10,
            "checks/mini/work/compiled/weights/tp0_sharded_checkpoint.safetensors": 10,
            "checks/mini/work/compiled/model.pt": 10,
        },
    )
    (tmp_path / "checks/mini/work/link").symlink_to("/etc/passwd")
    path = write_archive(tmp_path, ["mini"])
    assert path == tmp_path / "selftest-report.tar.gz"
    assert names(path) == {
        "report.md", "results.json", "checks/fused/log.txt", "checks/fused/result.json", "checks/mini/log.txt",
        "checks/mini/work/compiler/log-neuron-cc.txt",
    }  # fmt: skip
    assert not [left for left in tmp_path.iterdir() if left.name.startswith(".")]


def test_it_stays_small_and_names_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES_A_FILE", 100)
    monkeypatch.setattr(archive, "MOST_BYTES", 250)
    work = "checks/fused/work"
    files(tmp_path, **{"report.md": 50, f"{work}/a": 100, f"{work}/b": 101, f"{work}/c": 90, f"{work}/d": 20})
    path = write_archive(tmp_path, ["fused"])
    assert names(path) == {"report.md", f"{work}/a", f"{work}/c", "left_out.txt"}
    with tarfile.open(path) as packed:
        note = packed.extractfile("selftest/left_out.txt")
        assert note is not None
        assert note.read().decode().splitlines() == [f"{work}/b: 101 bytes", f"{work}/d: 20 bytes"]


def test_of_a_log_that_is_too_large_it_has_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES_A_FILE", 100)
    monkeypatch.setattr(archive, "LOG_END_BYTES", 8)
    files(tmp_path, **{"checks/fused/log.txt": 200})
    (tmp_path / "checks/fused/log.txt").write_text("x" * 200 + "the end\n")
    with tarfile.open(write_archive(tmp_path, ["fused"])) as packed:
        end = packed.extractfile("selftest/checks/fused/log.txt.end")
        assert end is not None and end.read() == b"the end\n"
        assert "selftest/left_out.txt" in packed.getnames()
