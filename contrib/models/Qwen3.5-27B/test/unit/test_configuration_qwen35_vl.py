# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's configuration: what is read, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from support.vision_cases import TINY, Qwen3_5VisionConfig


def test_configs_of_transformers_4_and_5_give_the_same_encoder() -> None:
    old = dict(TINY, model_type="qwen3_5", deepstack_visual_indexes=[], initializer_range=0.02)
    new = Qwen3_5VisionConfig(**{**TINY, "patch_size": [4, 4], "temporal_patch_size": 2})
    expected = Qwen35VisionConfig(**TINY)
    assert Qwen35VisionConfig.from_dict(old) == expected
    assert Qwen35VisionConfig.from_dict(new) == expected
    assert Qwen35VisionConfig.from_dict(new.to_dict()) == expected
    assert Qwen35VisionConfig.from_dict(SimpleNamespace(**old)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, ("depth=0", "positive integer")),
        ({"hidden_size": None}, ("hidden_size=None", "positive integer")),
        ({"hidden_size": 34}, ("hidden_size=34", "num_heads=2")),
        ({"num_position_embeddings": 50}, ("num_position_embeddings=50", "square")),
        ({"hidden_act": "silu"}, ("hidden_act='silu'", "gelu_pytorch_tanh")),
        ({"patch_size": [4, 8]}, ("patch_size=[4, 8]", "square")),
        ({"deepstack_visual_indexes": [1]}, ("deepstack_visual_indexes=[1]", "Qwen3.5")),
        ({"model_type": "qwen3_vl"}, ("model_type='qwen3_vl'", "qwen3_5_vision")),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("rope_type='yarn'", "axial")),
        ({"rope_parameters": {"rope_theta": -1}}, ("rope_theta=-1", "positive")),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field_and_value(changes: dict[str, Any], words: Sequence[str]) -> None:
    with pytest.raises(Qwen35ConfigError) as error:
        Qwen35VisionConfig.from_dict({**TINY, **changes})
    assert all(word in str(error.value) for word in words), error.value


def test_every_missing_field_is_named() -> None:
    with pytest.raises(Qwen35ConfigError) as error:
        Qwen35VisionConfig.from_dict({"depth": 2, "patch_size": 16})
    assert len(error.value.problems) == 7


@pytest.mark.parametrize("content", ["{}", "not JSON", "[]"])
def test_a_checkpoint_without_a_vision_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Qwen35ConfigError, match=r"config\.json"):
        Qwen35VisionConfig.from_pretrained(tmp_path)
