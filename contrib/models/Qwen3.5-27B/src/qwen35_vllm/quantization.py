# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What `qwen35 quantize` names in a checkpoint's `quant_method`, as a quantisation that vLLM knows.

vLLM refuses a name that nobody registered. The weights are read, and kept in what `options` say, by the model.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qwen35.configuration_qwen35 import DTYPES
from qwen35.fp8_form import CHANNEL_METHOD


@register_quantization_config(CHANNEL_METHOD)
class ChannelFp8(QuantizationConfig):
    """Matrices in float8_e4m3fn with a scale for each row; no layer of vLLM's runs with it."""

    def get_name(self) -> Any:
        return CHANNEL_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [*DTYPES.values()]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says what there is to say."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ChannelFp8:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        """None: vLLM builds no layer."""
