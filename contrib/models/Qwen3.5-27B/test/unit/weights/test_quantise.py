# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint written again in fp8: which tensors, their bits, its index, and nothing where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35.fp8_form import FP8, is_fp8_matrix, parse_fp8
from qwen35.weights import fp8, quantise
from qwen35.weights.checkpoint import INDEX_FILE, CheckpointReader
from qwen35.weights.quantise import quantise_checkpoint
from support.compare import assert_close
from support.fp8_cases import quantise_rows, write
from support.models import random_weights

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_convert.py"
MTP = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(96, 64), "mtp.fc.weight": torch.randn(64, 128)}


def source_weights() -> dict[str, torch.Tensor]:
    """A random checkpoint in bfloat16, with what else a published one has."""
    weights = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in random_weights().items()}
    vision = {"model.visual.blocks.0.attn.proj.weight": torch.randn(8, 8), "model.visual.scalar": torch.tensor(3.0)}
    return weights | MTP | vision


def quantised(tmp_path: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> tuple[Path, Any]:
    write(tmp_path / "source", weights, {}, shards)
    (output := tmp_path / "output").mkdir()
    return output, quantise_checkpoint(CheckpointReader(tmp_path / "source"), output)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("piece", [1 << 24, 700], ids=["whole", "some rows at a time"])
def test_matrices_of_layers_are_rounded_and_all_else_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, piece: int
) -> None:
    monkeypatch.setattr(fp8, "_PIECE", piece)
    weights = source_weights()
    output, report = quantised(tmp_path, weights, shards)
    found = CheckpointReader(output)
    matrices = [name for name in weights if is_fp8_matrix(name)]
    assert report.matrices == len(matrices) > 0 and "mtp.layers.0.mlp.up_proj.weight" in matrices
    assert found.keys() == weights.keys() | {f"{name}_scale" for name in matrices}
    for name, tensor in weights.items():
        if name not in matrices:
            assert found[name].dtype == tensor.dtype
            assert_close(found[name], tensor, label=name)
            continue
        values, scale = quantise_rows(tensor)
        assert found[name].dtype == FP8
        assert_close(found[name].float(), values, label=name)
        assert_close(found[f"{name}_scale"], scale, label=name)
    assert report.bytes_before == sum(tensor.nbytes for tensor in weights.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in found.values())


def test_shards_keep_their_names_and_get_an_index(tmp_path: Path) -> None:
    output, report = quantised(tmp_path, source_weights(), 3)
    index = json.loads((output / INDEX_FILE).read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "source").glob("*.safetensors")) and len(files) == 3
    assert index["metadata"]["total_size"] == report.bytes_after
    assert index["weight_map"] == {name: file for file in files for name in load_file(output / file)}


def test_a_lone_shard_keeps_its_index_without_which_it_is_not_found(tmp_path: Path) -> None:
    weights, source, file = source_weights(), tmp_path / "source", "model-00001-of-00002.safetensors"
    source.mkdir()
    save_file({name: tensor for name, tensor in weights.items() if name not in MTP}, source / file)
    weight_map = {name: "mtp.safetensors" if name in MTP else file for name in weights}  # which was not fetched
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (output := tmp_path / "output").mkdir()
    quantise_checkpoint(CheckpointReader(source), output)
    found = CheckpointReader(output)
    assert found.keys() == load_file(output / file).keys() and found.listed_only == {}


def test_what_is_said_of_the_form_is_what_is_read_and_lists_what_is_kept(tmp_path: Path) -> None:
    _, report = quantised(tmp_path, source_weights())
    form = parse_fp8(report.quantization_config)
    assert form is not None and form.block is None
    kept = {"lm_head", "mtp.fc", "model.visual.blocks.0.attn.proj", "model.layers.0.linear_attn.in_proj_a"}
    assert kept < set(form.not_converted) and not any(is_fp8_matrix(f"{name}.weight") for name in form.not_converted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.view(torch.int16), "gate_proj.weight is torch.int16 of shape [96, 64], not a matrix of bfloat16"),
        (lambda w: w.to(FP8), "gate_proj.weight is torch.float8_e4m3fn of shape"),
        (lambda w: w.flatten(), "gate_proj.weight is torch.bfloat16 of shape [6144], not a matrix"),
        (lambda w: w.index_fill(0, torch.tensor(3), float("nan")), "gate_proj.weight has infinities or NaN"),
    ],
)
def test_a_matrix_that_cannot_be_quantised_is_named(tmp_path: Path, change: Any, words: str) -> None:
    weights = source_weights()
    name = "model.layers.0.mlp.gate_proj.weight"
    weights[name] = change(weights[name])
    with pytest.raises(ValueError) as caught:
        quantised(tmp_path, weights)
    assert words in str(caught.value)


def test_a_checkpoint_without_layers_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no matrix of a layer to quantise; name a"):
        quantise_checkpoint(CheckpointReader(tmp_path), tmp_path)


def test_too_small_a_disk_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = quantised(tmp_path, source_weights())
    needed = os.path.getsize(output / "model.safetensors")
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(quantise.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match=f"needs {needed} bytes, the disk has {needed - 1} free; make room for 1 more"):
        quantise_checkpoint(CheckpointReader(tmp_path / "source"), tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.slow
def test_quantising_4_gb_takes_far_less_memory_than_a_shard_and_a_file(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--quantize", "--json", "--directory", str(tmp_path)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures["source"] >= 4e9 and figures["bound"] == figures["largest_shard"] + figures["written"]
    assert figures["resident"] <= figures["bound"], figures
    assert figures["anonymous"] <= 0.4e9 <= figures["bound"], figures  # as converting: some rows in float32
    assert list(tmp_path.iterdir()) == []
