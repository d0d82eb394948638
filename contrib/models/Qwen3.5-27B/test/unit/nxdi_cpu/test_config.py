# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The stand-ins for NxDI's configuration classes: defaults, checks, JSON."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nxdi_cpu import config as stand_in


def test_stand_in_lengths_and_batches_default_to_seq_len_and_batch_size() -> None:
    config = stand_in.NeuronConfig(seq_len=64, batch_size=3, tp_degree=4)
    assert config.max_length == config.n_positions == config.n_active_tokens == config.max_context_length == 64
    assert config.ctx_batch_size == config.tkg_batch_size == config.kv_cache_batch_size == config.max_batch_size == 3
    assert config.world_size == config.local_ranks_size == 4 and config.buckets == [64]
    assert config.max_new_tokens is None and config.logical_nc_config == 1 and config.lm_head_pad is False
    assert stand_in.NeuronConfig(seq_len=64, max_context_length=48).max_new_tokens == 16


def test_stand_in_remembers_whether_the_dtype_was_asked_for() -> None:
    assert stand_in.NeuronConfig().overrides_torch_dtype is False
    asked = stand_in.NeuronConfig(torch_dtype="float32")
    assert asked.torch_dtype == torch.float32 and asked.overrides_torch_dtype is True
    kept = stand_in.NeuronConfig(torch_dtype="float32", overrides_torch_dtype=False)
    assert kept.overrides_torch_dtype is False


def test_stand_in_warns_of_unknown_settings_but_not_of_its_own_derived_ones(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stand_in.NeuronConfig(**stand_in.to_dict(stand_in.NeuronConfig()))
        assert not caplog.records
        stand_in.NeuronConfig(sequence_length=5)
    assert "Unexpected keyword arguments: {'sequence_length': 5}" in caplog.text


def test_stand_in_configs_do_not_share_state() -> None:
    first, second = stand_in.NeuronConfig(), stand_in.NeuronConfig()
    first.buckets.append(1)
    assert second.buckets == [128]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cast_type": "bf16"}, "cast_type='bf16'"),
        ({"attention_dtype": "float32"}, "attention_dtype=torch.float32 differs"),
        ({"max_context_length": 256}, "max_context_length=256 exceeds max_length=128"),
        ({"context_encoding_buckets": [64, 256]}, "context_encoding_buckets: the largest, 256, exceeds 128"),
        ({"token_generation_batches": 2}, "token_generation_batches: the largest, 2, exceeds 1"),
        ({"tp_degree": 3, "cp_degree": 2}, "tp_degree=3 is not a multiple of cp_degree=2"),
        ({"torch_dtype": "int8"}, "Unsupported dtype: int8"),
    ],
)
def test_stand_in_refuses_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stand_in.NeuronConfig(**settings)


def test_stand_in_serialises_dtypes_classes_and_objects() -> None:
    value = {"a": [torch.float32, stand_in.OnDeviceSamplingConfig(top_k=3)], "b": stand_in.NeuronConfig}
    as_json = stand_in.to_dict(value)
    assert as_json["a"][0] == "float32" and as_json["a"][1]["top_k"] == 3
    assert as_json["b"] == {"__module__": "nxdi_cpu.config", "__name__": "NeuronConfig"}


def test_stand_in_inference_config_reads_and_writes_through_its_attribute_map() -> None:
    class Mapped(stand_in.InferenceConfig):
        attribute_map = {"hidden": "hidden_size"}  # noqa: RUF012

    config = Mapped(stand_in.NeuronConfig(), hidden=8)
    assert config.hidden_size == config.hidden == 8 and "hidden" not in vars(config)


def test_stand_in_inference_config_loads_then_overrides_then_derives_then_validates() -> None:
    seen: list[str] = []

    class Ordered(stand_in.InferenceConfig):
        def add_derived_config(self) -> None:
            seen.append(f"derive {self.size}")

        def validate_config(self) -> None:
            seen.append("validate")

    Ordered(stand_in.NeuronConfig(), load_config=lambda c: setattr(c, "size", 1), size=2)
    assert seen == ["derive 2", "validate"]


def test_stand_in_inference_config_names_missing_attributes() -> None:
    class Strict(stand_in.InferenceConfig):
        def get_required_attributes(self) -> list[str]:
            return ["neuron_config", "depth"]

    with pytest.raises(ValueError, match=r"Config must define \['depth'\]"):
        Strict(stand_in.NeuronConfig())
