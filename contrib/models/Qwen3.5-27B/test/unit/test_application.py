# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling, sharding and loading: the life of an application without a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35
from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from support.models import load_neuron, neuron_greedy, random_prompts
from support.oracle import save_reference

PACKAGE = Path(qwen35.__file__).parent
MODEL_ROOT = PACKAGE.parents[1]


def options(**more: Any) -> Qwen35NeuronConfig:
    return Qwen35NeuronConfig(torch_dtype=torch.float32, on_cpu=True, seq_len=128, **more)


@pytest.mark.parametrize("save_sharded_checkpoint", [False, True])
def test_a_compiled_model_is_found_by_its_path_alone(save_sharded_checkpoint: bool, tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    save_reference(checkpoint)
    neuron_config = options(save_sharded_checkpoint=save_sharded_checkpoint)
    config = Qwen35InferenceConfig.from_pretrained(checkpoint, neuron_config=neuron_config)
    NeuronQwen35ForCausalLM(str(checkpoint), config).compile(str(compiled))
    if save_sharded_checkpoint:
        (checkpoint / "model.safetensors").unlink()
    model = NeuronQwen35ForCausalLM(str(compiled))
    model.load(str(compiled))
    tokens, _ = neuron_greedy(model, random_prompts([5]), 4)
    assert tokens.shape == (1, 4)
    if not save_sharded_checkpoint:
        assert torch.equal(tokens, neuron_greedy(load_neuron(checkpoint), random_prompts([5]), 4)[0])


def greedy_of_shards(compiled: str, prompts: list[list[int]]) -> torch.Tensor:
    model = NeuronQwen35ForCausalLM(compiled)
    model.load(compiled)
    return neuron_greedy(model, prompts, 8)[0]


def test_shards_written_by_one_process_are_what_each_rank_loads(rank_pool: Any, tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    # 159 words and 2 ranks: the vocabulary is padded by one.
    save_reference(checkpoint, vocab_size=159)
    prompts = random_prompts([9], vocab_size=159)
    expected = neuron_greedy(load_neuron(checkpoint), prompts, 8)[0]
    config = Qwen35InferenceConfig.from_pretrained(
        checkpoint, neuron_config=options(tp_degree=2, save_sharded_checkpoint=True)
    )
    NeuronQwen35ForCausalLM(str(checkpoint), config).compile(str(compiled))
    for tokens in rank_pool(2).call(greedy_of_shards, str(compiled), prompts):
        assert torch.equal(tokens, expected)


def test_more_ranks_than_processes_is_an_error_that_names_the_launcher(tmp_path: Path) -> None:
    save_reference(tmp_path)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"):
        load_neuron(tmp_path, tp_degree=2)


def test_calling_before_loading_is_an_error_that_names_the_remedy() -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=options())
    model = NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config)
    with pytest.raises(RuntimeError, match="to_cpu"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=torch.arange(3).unsqueeze(0))


def test_a_prompt_longer_than_the_context_is_an_error_that_names_both_lengths(tmp_path: Path) -> None:
    save_reference(tmp_path)
    model = load_neuron(tmp_path, seq_len=64)
    with pytest.raises(ValueError, match=r"65 tokens.*64"):
        neuron_greedy(model, random_prompts([65]), 1)


@pytest.mark.parametrize(
    ("section", "expected"),
    [("Usage", "The capital of France is Paris"), ("Images and video", "red"), ("Many requests", "Tokyo")],
)
def test_the_examples_of_the_readme_run(section: str, expected: str, tmp_path: Path) -> None:
    readme = (MODEL_ROOT / "README.md").read_text()
    example = re.search(rf"^## {section}\n.*?```python\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    assert example is not None
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", example[1]]
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert expected in output


def test_the_runtime_does_not_need_transformers_own_model() -> None:
    for package in (PACKAGE, PACKAGE.parent / "nxdi_cpu"):
        for path in package.rglob("*.py"):
            assert not re.search(r"import.*Qwen3_5|transformers\.models\.qwen3_5", path.read_text()), path
