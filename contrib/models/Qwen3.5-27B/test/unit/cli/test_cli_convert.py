# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qwen35.cli import main
from qwen35.serving.loading import MINI_CHECKPOINT


def test_convert_writes_a_shard_per_rank_and_no_more(tmp_path: Path, run_json: Callable[..., dict[str, Any]]) -> None:
    result = run_json("convert", str(tmp_path / "out"), "--tp", "2")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "neuron_config.json",
        "weights/tp0_sharded_checkpoint.safetensors",
        "weights/tp1_sharded_checkpoint.safetensors",
    ]
    assert len(result["bytes_per_rank"]) == 2
    shard = load_file(tmp_path / "out" / "weights" / "tp1_sharded_checkpoint.safetensors")
    # 4 key and 8 value heads of 128: half of 2 * 512 + 2 * 1024 rows.
    assert shard["layers.0.linear_attn.in_proj_qkvz.weight"].shape == (1536, 128)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((MINI_CHECKPOINT / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((MINI_CHECKPOINT / "model.safetensors").read_bytes()[:100_000])
    assert main(["convert", str(tmp_path / "out"), "--model", str(broken)]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_an_output_that_exists_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(MINI_CHECKPOINT)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("qwen35: error:")
    assert "exists already" in message
