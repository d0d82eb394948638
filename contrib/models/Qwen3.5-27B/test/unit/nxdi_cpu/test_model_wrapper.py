# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the wrapper refuses to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from support.models import load_neuron, neuron_greedy, random_prompts
from support.oracle import save_reference


def options(**more: Any) -> Qwen35NeuronConfig:
    return Qwen35NeuronConfig(torch_dtype=torch.float32, on_cpu=True, seq_len=128, **more)


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
