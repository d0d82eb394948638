# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 for AWS Trainium on NxDI, and on any CPU through stand-ins of the same classes.

A name is imported from its module when it is first used, so that `import qwen35` costs nothing and a configuration
does not load the model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "FinishReason": "serving.request",
    "HuggingFaceGenerationAdapter": "serving.hf_adapter",
    "NeuronConfig": "nxdi",
    "NeuronGatedDeltaNet": "layers.gated_deltanet",
    "NeuronQwen35Attention": "layers.attention",
    "NeuronQwen35DecoderLayer": "modeling_qwen35",
    "NeuronQwen35ForCausalLM": "modeling_qwen35",
    "NeuronQwen35Model": "modeling_qwen35",
    "NeuronQwen35VLForCausalLM": "modeling_qwen35_vl",
    "NeuronQwen35VLModel": "modeling_qwen35_vl",
    "NeuronQwen35VisionForImageEncoding": "vision.application",
    "NeuronQwen35VisionModel": "vision.encoder",
    "OnDeviceSamplingConfig": "nxdi",
    "PrefixCache": "serving.prefix_cache",
    "Qwen35ConfigError": "configuration_qwen35",
    "Qwen35DecoderModelInstance": "submodels",
    "Qwen35Engine": "serving.engine",
    "Qwen35InferenceConfig": "configuration_qwen35",
    "Qwen35MLP": "layers.mlp",
    "Qwen35ModelWrapper": "submodels",
    "Qwen35NeuronConfig": "configuration_qwen35",
    "Qwen35VLInferenceConfig": "configuration_qwen35_vl",
    "Qwen35VisionConfig": "configuration_qwen35_vl",
    "Qwen35VisionInferenceConfig": "vision.application",
    "Request": "serving.request",
    "SamplingOptions": "serving.sampling",
    "StepOutput": "serving.request",
}

if TYPE_CHECKING:
    from .configuration_qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
    from .configuration_qwen35_vl import Qwen35VisionConfig, Qwen35VLInferenceConfig
    from .layers.attention import NeuronQwen35Attention
    from .layers.gated_deltanet import NeuronGatedDeltaNet
    from .layers.mlp import Qwen35MLP
    from .modeling_qwen35 import NeuronQwen35DecoderLayer, NeuronQwen35ForCausalLM, NeuronQwen35Model
    from .modeling_qwen35_vl import NeuronQwen35VLForCausalLM, NeuronQwen35VLModel
    from .nxdi import NeuronConfig, OnDeviceSamplingConfig
    from .serving.engine import Qwen35Engine
    from .serving.hf_adapter import HuggingFaceGenerationAdapter
    from .serving.prefix_cache import PrefixCache
    from .serving.request import FinishReason, Request, StepOutput
    from .serving.sampling import SamplingOptions
    from .submodels import Qwen35DecoderModelInstance, Qwen35ModelWrapper
    from .vision.application import NeuronQwen35VisionForImageEncoding, Qwen35VisionInferenceConfig
    from .vision.encoder import NeuronQwen35VisionModel
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "FinishReason",
    "HuggingFaceGenerationAdapter",
    "NeuronConfig",
    "NeuronGatedDeltaNet",
    "NeuronQwen35Attention",
    "NeuronQwen35DecoderLayer",
    "NeuronQwen35ForCausalLM",
    "NeuronQwen35Model",
    "NeuronQwen35VLForCausalLM",
    "NeuronQwen35VLModel",
    "NeuronQwen35VisionForImageEncoding",
    "NeuronQwen35VisionModel",
    "OnDeviceSamplingConfig",
    "PrefixCache",
    "Qwen35ConfigError",
    "Qwen35DecoderModelInstance",
    "Qwen35Engine",
    "Qwen35InferenceConfig",
    "Qwen35MLP",
    "Qwen35ModelWrapper",
    "Qwen35NeuronConfig",
    "Qwen35VLInferenceConfig",
    "Qwen35VisionConfig",
    "Qwen35VisionInferenceConfig",
    "Request",
    "SamplingOptions",
    "StepOutput",
]
