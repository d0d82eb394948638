# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Quantised weights of every maker, and adapters, are named as what they are, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen35.configuration_qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.weights.checkpoint import CheckpointError, CheckpointReader
from qwen35.weights.conversion import ConversionError
from qwen35.weights.text_rules import convert_checkpoint
from support.models import TINY, random_weights

CONFIG = Qwen35InferenceConfig(Qwen35NeuronConfig(torch_dtype="float32"), **TINY)
LAYERS = [f"model.layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")]
INT32, UINT8, FP8 = (torch.ones(8, 8, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.float8_e4m3fn))
SCALE = torch.ones(8)

# maker -> what stands for `weight` of a linear layer; "weight" among them is the packed one.
MAKERS: dict[str, dict[str, torch.Tensor]] = {
    "AWQ": {"qweight": INT32, "qzeros": INT32, "scales": SCALE},
    "GPTQ": {"qweight": INT32, "qzeros": INT32, "scales": SCALE, "g_idx": INT32},
    "bitsandbytes": {"weight": UINT8, "weight.absmax": SCALE, "weight.quant_state.bitsandbytes__nf4": UINT8},
    "fp8": {"weight": FP8, "weight_scale_inv": SCALE},
    "compressed-tensors": {"weight_packed": INT32, "weight_scale": SCALE, "weight_shape": INT32},
    "NVIDIA ModelOpt": {"weight": UINT8, "weight_scale": FP8, "weight_scale_2": SCALE},
    "MLX": {"weight": INT32.to(torch.uint32), "scales": SCALE, "biases": SCALE},
    "HQQ": {"W_q": UINT8, "meta": SCALE},
    "AQLM": {"codebooks": SCALE, "codes": INT32, "scales": SCALE},
    "EXL2": {"q_weight": INT32, "q_invperm": INT32, "q_scale": INT32},
    "EXL3": {"trellis": INT32, "suh": SCALE, "svh": SCALE},
    "quanto": {"weight._data": UINT8, "weight._scale": SCALE},
}


def quantised(maker: str) -> dict[str, torch.Tensor]:
    """The MLPs of a random checkpoint in the form of a maker; norms, attention and embedding as they were."""
    weights = random_weights()
    for layer in LAYERS:
        del weights[f"{layer}.weight"]
        weights |= {f"{layer}.{name}": tensor.clone() for name, tensor in MAKERS[maker].items()}
    return weights


def refuse(source: dict[str, torch.Tensor] | CheckpointReader) -> str:
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(source, CONFIG)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("maker", MAKERS)
def test_the_names_of_tensors_tell_the_maker(tmp_path: Path, maker: str) -> None:
    save_file(quantised(maker), tmp_path / "model.safetensors")
    problem = refuse(CheckpointReader(tmp_path))
    assert f"quantised with {maker} (" in problem and " more); " in problem and "use the unquantised" in problem


@pytest.mark.parametrize(
    ("file", "content", "maker"),
    [
        ("quantize_config.json", {"bits": 4}, "GPTQ"),
        ("quantize_config.json", {"quant_method": "awq"}, "AWQ"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "NVIDIA ModelOpt"),
        ("quant_config.json", {"w_bit": 4}, "AWQ"),
        ("quantize_config.json", "broken", "GPTQ"),
        ("quantization_config.json", {"quant_method": "auto-round"}, "auto-round"),
    ],
)
def test_a_file_beside_the_weights_names_the_maker(tmp_path: Path, file: str, content: object, maker: str) -> None:
    save_file(quantised("GPTQ"), tmp_path / "model.safetensors")
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert f"quantised with {maker} (" in refuse(CheckpointReader(tmp_path))


def test_packed_weights_without_another_sign_are_told_by_dtype_and_by_the_file_beside_them(tmp_path: Path) -> None:
    packed = {name: t.to(torch.float8_e4m3fn) if "mlp" in name else t for name, t in random_weights().items()}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(CheckpointReader(tmp_path), CONFIG)
    *first, more, beside = caught.value.problems
    assert len(first) == 3 and all("is torch.float8_e4m3fn" in line for line in first)
    assert more == "9 more tensors are of such a dtype" and "quantised with NVIDIA ModelOpt" in beside


def test_a_left_over_file_beside_plain_weights_does_not_matter(tmp_path: Path) -> None:
    save_file(random_weights(), tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text("{}")
    assert convert_checkpoint(CheckpointReader(tmp_path), CONFIG)["norm.weight"].shape == (64,)


def test_dtypes_below_a_byte_are_named(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"  ")
    with pytest.raises(CheckpointError, match="x is F4: quantised checkpoints are not read"):
        CheckpointReader(tmp_path)


def test_an_adapter_that_was_not_merged_is_named() -> None:
    weights = random_weights()
    for layer in LAYERS:
        weights[f"{layer}.base_layer.weight"] = weights.pop(f"{layer}.weight")
        weights |= {f"{layer}.lora_A.default.weight": SCALE, f"{layer}.lora_B.default.weight": SCALE}
    assert "an adapter is not merged into the weights (" in refuse(
        {f"base_model.model.{n}": t for n, t in weights.items()}
    )


@pytest.mark.parametrize("file", ["x.Q4_K_M.gguf", "adapter_config.json"])
def test_a_directory_of_another_form_without_config_json_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig.from_pretrained(tmp_path)
    (problem,) = caught.value.problems
    assert ("GGUF files (x.Q4_K_M.gguf) are not read" if file.endswith("gguf") else "an adapter is not") in problem
    with pytest.raises(CheckpointError, match="GGUF" if file.endswith("gguf") else "download the safetensors files"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("fields", "maker"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": "b" * 999}}},
            "compressed",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}}, "NVIDIA ModelOpt"),
    ],
)
def test_config_json_names_the_maker(fields: dict[str, object], maker: str) -> None:
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(Qwen35NeuronConfig(), **TINY, **fields)
    (problem,) = caught.value.problems
    assert f"the checkpoint is quantised with {maker}" in problem and len(problem) < 250
