# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What AWS's plugin for NxDI (vllm-neuron) asks for of a model that it serves in the place of this package's platform.

It reads the number and width of key heads off the top of a configuration, and finds the application in NxDI's table of
models, by the name of the architecture. It serves text: what it knows of images is for Llama 4 alone.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from qwen35.nxdi import offer_application

ARCHITECTURES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM")
"""Of checkpoints with and without a vision encoder."""


class Qwen35TextConfig(PretrainedConfig):
    """The fields of config.json of a checkpoint of text alone, for transformers that has no class for them."""

    model_type = "qwen3_5_text"

    def __init__(self, tie_word_embeddings: bool = False, **kwargs: Any) -> None:
        # transformers 4 would take a silent config.json for one with tied embeddings.
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Qwen35Config(PretrainedConfig):
    """The same of a checkpoint with a vision encoder: the decoder's fields are in `text_config`."""

    model_type = "qwen3_5"
    sub_configs = {"text_config": Qwen35TextConfig}  # noqa: RUF012 -- transformers' name and form

    def __init__(
        self, text_config: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **kwargs: Any
    ) -> None:
        self.text_config = Qwen35TextConfig(**(text_config or {}))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_key_value_heads(self) -> int:
        """The decoder's, for the plugin, which does not look into `text_config`."""
        return int(self.text_config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        """The decoder's, likewise."""
        return int(self.text_config.head_dim)


def register(model: str) -> None:
    """Tell transformers, vLLM and NxDI of the model, in a process of vLLM whose platform is AWS's.

    Args:
        model: where the class is that vLLM takes it for, as "module:class".
    """
    from vllm import ModelRegistry

    configurations = (Qwen35Config, Qwen35TextConfig)
    for config in configurations:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, model)
    offer_application([config.model_type for config in configurations], _application)


def _application() -> type:
    from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM

    return NeuronQwen35ForCausalLM
