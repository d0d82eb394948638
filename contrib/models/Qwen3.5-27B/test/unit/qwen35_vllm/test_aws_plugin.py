# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration classes for AWS's plugin: what it reads of them, and what NxDI makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.nxdi import load_pretrained_config
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35_vllm.aws_plugin import Qwen35Config, Qwen35TextConfig

MINI = json.loads((MINI_CHECKPOINT / "config.json").read_text())
CONFIGS = {"with a vision encoder": (Qwen35Config, MINI), "text": (Qwen35TextConfig, MINI["text_config"])}
every_kind = pytest.mark.parametrize(("cls", "fields"), CONFIGS.values(), ids=CONFIGS)


@every_kind
def test_heads_are_at_the_top_and_the_decoder_is_found(cls: type[Any], fields: dict[str, Any]) -> None:
    config = cls(**fields)
    assert (config.num_key_value_heads, config.head_dim) == (2, 64)
    assert config.get_text_config().vocab_size == 1024 and config.get_text_config().num_hidden_layers == 8


@every_kind
def test_it_is_as_it_was_when_it_is_read_again(cls: type[Any], fields: dict[str, Any], tmp_path: Path) -> None:
    cls(**fields).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).to_dict() == cls(**fields).to_dict()
    assert repr(cls(**fields)) and cls().tie_word_embeddings is False  # transformers prints what differs from cls()


@every_kind
def test_nxdi_makes_of_it_what_this_package_reads_itself(
    backend: str, cls: type[Any], fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fields["model_type"] in CONFIG_MAPPING:
        pytest.skip("transformers has classes of its own")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, fields["model_type"], cls)  # what AutoConfig.register does
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = vars(Qwen35InferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig()))
    found = Qwen35InferenceConfig(Qwen35NeuronConfig(), load_config=load_pretrained_config(tmp_path))
    of_its_own = {"neuron_config", "transformers_version", "metadata"}
    for name in expected.keys() - of_its_own:
        assert vars(found)[name] == expected[name], name
    assert found.neuron_config.torch_dtype == torch.bfloat16
