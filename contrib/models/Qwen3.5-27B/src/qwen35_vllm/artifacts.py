# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model that the worker runs, loaded: compiled for Neuron and kept, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM

from .options import ServeOptions, inference_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Progress = Callable[[str], None]
"""Told what is done now, a line at a time."""


def load_model(vllm_config: VllmConfig, options: ServeOptions, progress: Progress) -> NeuronQwen35ForCausalLM:
    """The model that vLLM's configuration and ours name, loaded and ready to be called."""
    config = inference_config(vllm_config, options)
    model = NeuronQwen35ForCausalLM(config._name_or_path, config)
    progress(f"loading {config._name_or_path} on the CPU")
    model.to_cpu()
    return model
