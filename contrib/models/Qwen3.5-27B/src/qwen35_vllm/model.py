# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The classes that vLLM inspects to know what kind of model it serves; the worker runs NxDI's applications instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from .media_processor import PLACEHOLDERS, DummyMedia, MediaInfo, MediaProcessor


class Qwen35ForVLLM(nn.Module):
    """A decoder of text, as vLLM tells one by the names and parameters of its methods; never built.

    Not marked as hybrid: the recurrent state has no blocks that vLLM could count, a row of the compiled batch has it.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        raise RuntimeError("vLLM built the registered class: its platform is not qwen35, see VLLM_PLUGINS")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=MediaInfo, dummy_inputs=DummyMedia)
class Qwen35VLForVLLM(Qwen35ForVLLM, SupportsMultiModal):
    """The same with images and video, as far as its checkpoint has a vision encoder."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image or a video in a text, where the chat template puts nothing there itself."""
        return PLACEHOLDERS[modality]
