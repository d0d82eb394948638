# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations: of compiled models, of this machine, of a checkpoint's generation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qwen35 import Qwen35InferenceConfig, Qwen35VLInferenceConfig
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.serving.loading import (
    MINI_CHECKPOINT,
    checkpoint_of,
    default_neuron_config,
    load_compiled_config,
    load_generation_config,
)


@pytest.mark.parametrize("config_cls", [Qwen35InferenceConfig, Qwen35VLInferenceConfig])
def test_a_compiled_model_tells_its_class_and_its_checkpoint(
    config_cls: type[Qwen35InferenceConfig], tmp_path: Path
) -> None:
    config_cls.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(96, 3)).save(str(tmp_path))
    config = load_compiled_config(tmp_path)
    assert type(config) is config_cls
    assert (config.neuron_config.seq_len, config.neuron_config.batch_size) == (96, 3)
    assert checkpoint_of(tmp_path) == MINI_CHECKPOINT


def test_a_directory_that_was_not_compiled_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no neuron_config.json there; name what 'qwen35 compile' wrote"):
        load_compiled_config(tmp_path)


def test_a_checkpoint_that_is_gone_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    checkpoint.mkdir()
    shutil.copy(MINI_CHECKPOINT / "config.json", checkpoint)
    Qwen35InferenceConfig.from_pretrained(checkpoint, neuron_config=default_neuron_config(96)).save(str(compiled))
    shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match=r"compiled was compiled of .*checkpoint, which is gone: pass --model"):
        checkpoint_of(compiled)


def test_the_defaults_are_those_of_this_machine() -> None:
    neuron_config = default_neuron_config(96, batch_size=2, prefill_chunk_size=32)
    assert neuron_config.on_cpu is not NXDI_AVAILABLE
    assert neuron_config.torch_dtype is (torch.bfloat16 if NXDI_AVAILABLE else torch.float32)
    assert (neuron_config.seq_len, neuron_config.batch_size, neuron_config.prefill_chunk_size) == (96, 2, 32)
    assert default_neuron_config(96, torch_dtype=torch.float16).torch_dtype is torch.float16


def test_what_ends_an_answer_is_in_generation_config_or_else_in_config(tmp_path: Path) -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(96))
    assert load_generation_config(tmp_path, config).eos_token_id == config.eos_token_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_generation_config(tmp_path, config).eos_token_id == [5, 6]
