# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations in, text out, one batch at a time.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..vision.processing import VisionProcessor
from .hf_adapter import HuggingFaceGenerationAdapter
from .loading import load_generation_config
from .prompts import Messages, encode, encode_chat, load_tokenizer
from .sampling import GREEDY, SamplingOptions

OnToken = Callable[[torch.Tensor], None]
"""Gets the tokens [B] of each step."""


@dataclass(frozen=True)
class Generation:
    """Generated tokens and texts, a row a prompt, without prompt and padding; times in seconds."""

    tokens: list[list[int]]
    texts: list[str]
    time_to_first_token: float
    time_per_output_token: float | None
    """Mean over the steps after the first; None when one step was enough."""


class _TokenClock(StoppingCriteria):
    """Never stops anything: `generate` calls it after every step, on NxDI too, which has no streamers."""

    def __init__(self, on_token: OnToken | None) -> None:
        self.on_token = on_token
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        if self.on_token is not None:
            self.on_token(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class TextGenerator:
    """A loaded model with its tokenizer; of the vision-language class where the configuration is."""

    def __init__(
        self, model: NeuronQwen35ForCausalLM, model_path: Path, tokenizer: Any, generation_config: GenerationConfig
    ) -> None:
        self.model, self.model_path, self.tokenizer = model, model_path, tokenizer
        self.generation_config = generation_config
        self.adapter = HuggingFaceGenerationAdapter(model)

    @classmethod
    def load(cls, model_path: Path, config: Qwen35InferenceConfig, compiled_path: Path | None = None) -> TextGenerator:
        """Read, convert and load a checkpoint, or load what was compiled of it.

        Raises:
            ValueError: the checkpoint or the configuration does not do.
        """
        with_images = isinstance(config, Qwen35VLInferenceConfig)
        model_cls = NeuronQwen35VLForCausalLM if with_images else NeuronQwen35ForCausalLM
        model = model_cls(str(model_path), config)
        if compiled_path is None:
            model.to_cpu()
        else:
            model.load(str(compiled_path))
        return cls(model, model_path, load_tokenizer(model_path), load_generation_config(model_path, config))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Complete all prompts as one right-padded batch; `on_token` gets the tokens [B] of each step as they come."""
        return self.complete(encode(self.tokenizer, prompts), max_new_tokens, sampling, on_token)

    def chat(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Answer conversations whose messages may hold images and videos (`encode_chat`), as one batch.

        Raises:
            VisionInputError: an image or a video cannot be used; all are listed, before the model runs.
        """
        inputs = encode_chat(self.tokenizer, VisionProcessor.from_pretrained(self.model_path), conversations)
        return self.complete(inputs, max_new_tokens, sampling, on_token)

    def complete(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Complete encoded prompts: input_ids and attention_mask [B, S], and pixels and grids as a processor gives."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, **{k: v for k, v in asdict(sampling).items() if k != "seed"}}
        clock = _TokenClock(on_token)
        start = time.perf_counter()
        sequences = self.adapter.generate(
            **inputs,
            generation_config=GenerationConfig(
                **chosen,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.generation_config.eos_token_id,
                pad_token_id=self.pad_token_id,
            ),
            stopping_criteria=[clock],
        )
        tokens = [self._until_eos(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        steps = len(clock.times) - 1
        return Generation(
            tokens=tokens,
            texts=[self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens],
            time_to_first_token=clock.times[0] - start,
            time_per_output_token=(clock.times[-1] - clock.times[0]) / steps if steps else None,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        eos = self.generation_config.eos_token_id
        return list(eos) if isinstance(eos, (list, tuple)) else [eos]

    @property
    def pad_token_id(self) -> int:
        return self.eos_token_ids[0]

    def _until_eos(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.eos_token_ids]
        return row[: ends[0] + 1] if ends else row
