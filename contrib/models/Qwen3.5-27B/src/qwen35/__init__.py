# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 for AWS Trainium on NxDI, and on any CPU through stand-ins of the same classes."""

from .configuration_qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from .configuration_qwen35_vl import Qwen35VisionConfig, Qwen35VLInferenceConfig
from .layers.attention import NeuronQwen35Attention
from .layers.gated_deltanet import NeuronGatedDeltaNet
from .modeling_qwen35 import (
    NeuronQwen35DecoderLayer,
    NeuronQwen35ForCausalLM,
    NeuronQwen35Model,
    Qwen35DecoderModelInstance,
    Qwen35MLP,
    Qwen35ModelWrapper,
)
from .modeling_qwen35_vl import NeuronQwen35VLForCausalLM, NeuronQwen35VLModel
from .nxdi import HuggingFaceGenerationAdapter, NeuronConfig, OnDeviceSamplingConfig
from .serving.engine import FinishReason, Qwen35Engine, Request, StepOutput
from .serving.generation import SamplingOptions
from .serving.prefix_cache import PrefixCache
from .vision.application import NeuronQwen35VisionForImageEncoding, Qwen35VisionInferenceConfig
from .vision.encoder import NeuronQwen35VisionModel

__version__ = "0.1.0"

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
