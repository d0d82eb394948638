# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations with images and videos, as vLLM takes them and as `TextGenerator` does, on the mini."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import chat_text, encode_chat, load_tokenizer
from qwen35.vision.content import media_of
from qwen35.vision.media import Video
from qwen35.vision.processing import VisionProcessor

TOKENIZER = load_tokenizer(MINI_CHECKPOINT)
PROCESSOR = VisionProcessor.from_pretrained(MINI_CHECKPOINT)
ENGINE: Mapping[str, Any] = {"skip_tokenizer_init": False, "max_model_len": 512, "max_num_seqs": 4}
"""Arguments of an engine of the mini that takes texts, and images and videos in them."""


def conversation(*content: str | Image.Image | Video) -> list[dict[str, Any]]:
    """One turn of the user, of texts, images and videos."""

    def item(part: Any) -> dict[str, Any]:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, Video) else "image"
        return {"type": kind, kind: part}

    return [{"role": "user", "content": [item(part) for part in content]}]


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The prompt of a conversation, with its media, for vLLM's engine; videos with their rate as metadata."""
    images, videos = media_of(messages)
    data: dict[str, Any] = {"image": images} if images else {}
    if videos:
        data["video"] = [([*video.frames], {"fps": video.fps}) for video in videos]  # type: ignore[union-attr]
    return {"prompt": chat_text(TOKENIZER, messages), "multi_modal_data": data}


def expected_inputs(messages: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """What `TextGenerator` gives its model."""
    return encode_chat(TOKENIZER, PROCESSOR, [messages])


def add_chat(engine: LLMEngine, request_id: str, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> None:
    """Queue a conversation."""
    engine.add_request(request_id, prompt_of(messages), params)  # type: ignore[arg-type]
