# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which fp8 checkpoints are read, by what their config.json says, and which tensors are in fp8."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS, Qwen35ConfigError
from qwen35.fp8_form import CHANNEL_METHOD, FP8, KEPT, MODULES_NOT_CONVERTED, is_fp8_matrix, parse_fp8
from qwen35.memory.counting import rank_module
from qwen35.weights.text_rules import conversion_plan
from support.applications import application, needs_stand_ins
from support.fp8_cases import PUBLISHED
from support.models import TINY


def test_the_published_form_has_a_scale_for_each_block_of_128() -> None:
    form = parse_fp8({**PUBLISHED, "modules_to_not_convert": ["lm_head"], "scale_fmt": None})
    assert form is not None and form.block == (128, 128) and form.not_converted == ("lm_head",)
    assert form.scale_name("x.weight") == "x.weight_scale_inv" and form.weight_name("x.weight_scale_inv") == "x.weight"
    assert form.weight_name("x.weight") is form.weight_name("x.weight_scale") is form.weight_name("y_scale_inv") is None
    assert form.scale_shape((128, 5120)) == (1, 40) and form.scale_shape((130, 300)) == (2, 3)


def test_our_own_form_has_a_scale_for_each_row() -> None:
    form = parse_fp8({"quant_method": CHANNEL_METHOD, "fmt": "e4m3"})
    assert form is not None and form.block is None and form.scale_shape((130, 300)) == (130, 1)
    assert form.scale_name("x.weight") == "x.weight_scale" and form.weight_name("x.weight_scale") == "x.weight"


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", None, 7, {}])
def test_another_method_is_not_ours(method: Any) -> None:
    assert parse_fp8({**PUBLISHED, "quant_method": method}) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        *(("weight_block_size", value) for value in (None, [128], [128, 0], [128, 128.0], "128", [True, 128], 128)),
        *(("modules_to_not_convert", value) for value in ("lm_head", [7], {"lm_head": 1})),
    ],
)
def test_what_is_not_read_is_one_line_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        parse_fp8({**PUBLISHED, field: value})
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(Qwen35NeuronConfig(), **TINY, quantization_config={**PUBLISHED, field: value})
    (problem,) = caught.value.problems
    assert "quantised with fp8" in problem and f"{field}={value!r}" in problem and "use the bf16 checkpoint" in problem


def test_a_checkpoint_in_fp8_is_configured_like_any_other() -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), **TINY, quantization_config=PUBLISHED)
    assert config.fp8_form == parse_fp8(PUBLISHED)
    again = Qwen35InferenceConfig.from_json_string(config.to_json_string())
    assert again.fp8_form == config.fp8_form


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", ""])
def test_of_27b_all_matrices_of_the_layers_are_in_fp8_and_nothing_else(prefix: str) -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), **QWEN35_PRESETS["27B"])
    sources = {name: shape for rule in conversion_plan(config) for name, shape in rule.sources.items()}
    kept = {name.split(".")[-2] for name in sources if not is_fp8_matrix(prefix + name)} - {"linear_attn"}
    assert kept == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "conv1d",
        "in_proj_a", "in_proj_b",
    }  # fmt: skip
    # A_log and dt_bias are directly under linear_attn. What is kept has a reason on record.
    assert not is_fp8_matrix(prefix + "layers.0.linear_attn.A_log")
    listed = ", ".join(KEPT)
    assert all(name in listed or "norm" in name for name in kept)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp.layers.0.mlp.gate_proj.weight", True),
        ("mtp.layers.0.self_attn.q_proj.weight", True),
        ("mtp.fc.weight", False),
        ("model.visual.blocks.0.attn.proj.weight", False),
        ("model.visual.layers.0.mlp.linear_fc1.weight", False),
        ("model.layers.0.mlp.gate_proj.bias", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", False),
    ],
)
def test_mtp_layers_are_in_fp8_and_the_vision_encoder_is_not(name: str, expected: bool) -> None:
    assert is_fp8_matrix(name) is expected


@needs_stand_ins
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_each_parameter_is_built_in_the_dtype_that_its_module_declares(weights_dtype: str | None) -> None:
    model = application(TINY, weights_dtype=weights_dtype)

    def leaf(name: str) -> str:
        return ".".join(name.split(".")[-2:])

    declared = {leaf(name): p.dtype for name, p in rank_module(model).named_parameters() if "kv_mgr" not in name}
    built = {leaf(target): rule.dtype for rule in conversion_plan(model.config) for target in rule.targets}
    built |= {name.replace("weight", "scale"): torch.float32 for name, dtype in built.items() if dtype == FP8}
    assert built == declared
    assert (FP8 in declared.values()) == (weights_dtype == "fp8")
    if weights_dtype == "fp8":
        in_fp8 = {name.split(".")[0] for name, dtype in declared.items() if dtype == FP8}
        sources = {s.split(".")[-2] for rule in conversion_plan(model.config) for s in rule.sources if is_fp8_matrix(s)}
        assert in_fp8 == sources - {"in_proj_qkv", "in_proj_z"} | {"in_proj_qkvz"}


@needs_stand_ins
@pytest.mark.parametrize("kept", MODULES_NOT_CONVERTED)
def test_no_name_that_nxd_must_leave_alone_is_part_of_another_modules(kept: str) -> None:
    """NxD looks for each in whole paths: "mlp.gate" would leave every gate_proj in bfloat16."""
    module = rank_module(application(TINY))
    paths = {path for path, _ in module.named_modules() if kept in path}
    assert all(kept in path.split(".") for path in paths)
