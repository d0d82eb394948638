# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 quantize`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35.cli import main
from qwen35.serving.loading import MINI_CHECKPOINT
from support.compare import assert_close
from support.models import load_neuron, neuron_greedy, random_prompts


def test_what_it_writes_is_a_checkpoint_that_gives_what_quantising_at_load_gives(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    output = tmp_path / "new" / "fp8"
    result = run_json("quantize", str(output))
    assert result["matrices"] == 57 and result["bytes_after"] < 0.6 * result["bytes_before"]
    copied = {path.name for path in MINI_CHECKPOINT.iterdir()}
    assert {path.name for path in output.iterdir()} == copied
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "fp8_per_channel"
    assert config == json.loads((MINI_CHECKPOINT / "config.json").read_text())
    prompts = random_prompts([12])
    _, at_load = neuron_greedy(load_neuron(MINI_CHECKPOINT, weights_dtype="fp8"), prompts, 2)
    _, from_disk = neuron_greedy(load_neuron(output, weights_dtype="fp8"), prompts, 2)
    assert_close(from_disk, at_load, label="logits, kept in fp8")
    _, dequantised = neuron_greedy(load_neuron(output), prompts, 2)
    assert_close(dequantised, at_load, atol=1e-4, rtol=1e-4, label="logits, dequantised")


def test_images_are_answered_by_a_quantised_checkpoint(tmp_path: Path, run_json: Callable[..., dict[str, Any]]) -> None:
    run_json("quantize", str(tmp_path / "fp8"))
    source, written = (load_file(path / "model.safetensors") for path in (MINI_CHECKPOINT, tmp_path / "fp8"))
    for name in source:
        if "visual" in name:
            assert_close(written[name], source[name], label=name)
    assert not any("visual" in name and name.endswith("_scale") for name in written)


def test_a_checkpoint_in_fp8_is_not_quantised_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path / "once")]) == 0
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "twice"), "--model", str(tmp_path / "once")]) == 2
    assert "it is in fp8 already; name the bf16 checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_what_stops_half_way_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.7.mlp.down_proj.weight"))
    tensors[name][0, 0] = torch.inf
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    assert main(["quantize", str(tmp_path / "out"), "--model", str(tmp_path / "broken")]) == 2
    assert f"{name} has infinities or NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_tensors_that_do_not_fit_config_json_are_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("layers.7.mlp.down_proj.weight")))
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    assert main(["quantize", str(tmp_path / "out"), "--model", str(tmp_path / "broken")]) == 2
    assert "layers.7.mlp.down_proj.weight is missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_output_that_exists_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(MINI_CHECKPOINT)]) == 2
    assert "exists already" in capsys.readouterr().err
